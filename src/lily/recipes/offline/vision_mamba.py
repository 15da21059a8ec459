"""A bidirectional Mamba over image patches, in the structure of Vision Mamba (Vim, arXiv 2401.09417).

Each block reads the patches once forwards and once backwards with scans of their own; the projections into and out of
them are shared, and their sum is halved. Parameter names inside a block are those of Vim's code (`in_proj`, `x_proj`,
`x_proj_b`, `dt_proj`, `dt_proj_b`, ...). Convolution and scan are the functions of transformers' Mamba, so its CUDA
kernels are used where they are there. Importing this module tells transformers' Auto classes of the model: it is saved
and loaded like any other, without remote code.

What differs from Vim: every projection is called (Vim's fused kernels read the weights of `x_proj` and `dt_proj`, and
its `in_proj` and `out_proj` are products with a weight), so an adapter on any of them acts; the bias of `dt_proj` is
added by it and not inside the scan; and stochastic depth is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.mamba.modeling_mamba import MambaRMSNorm, causal_conv1d_fn, mamba_selective_scan


class VisionMambaConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of a `VisionMambaForImageClassification`. The defaults are Vim-S.

    Args:
        image_size: height and width in pixels.
        patch_size: side of a patch.
        num_channels: of the image.
        hidden_size: width of the residual stream.
        num_hidden_layers: blocks.
        state_size: of the scan.
        conv_kernel: of the convolution before it.
        expand: the scan's width over `hidden_size`.
        time_step_rank: rank of the time step's projection; None: a sixteenth of `hidden_size`.
        class_token: classify by a token in the middle of the patches, as Vim does; False: by the mean of all patches.
        layer_norm_epsilon: of the RMS norms.
        initializer_range: standard deviation of new embeddings and of the new head.
        use_mambapy: on a CPU, scan with the `mambapy` package if it is installed.
    """

    model_type = "vision_mamba"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        hidden_size: int = 384,
        num_hidden_layers: int = 24,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        time_step_rank: int | None = None,
        class_token: bool = True,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        use_mambapy: bool = False,
        **kwargs: Any,
    ) -> None:
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.state_size, self.conv_kernel, self.expand = state_size, conv_kernel, expand
        self.time_step_rank = time_step_rank or math.ceil(hidden_size / 16)
        self.class_token = class_token
        self.layer_norm_epsilon, self.initializer_range = layer_norm_epsilon, initializer_range
        self.use_mambapy = use_mambapy
        super().__init__(**kwargs)


class BidirectionalMixer(nn.Module):
    """One scan forwards and one backwards between shared projections.

    Args:
        config: the sizes.
    """

    def __init__(self, config: VisionMambaConfig) -> None:
        super().__init__()
        self.config = config
        width, rank, state = config.expand * config.hidden_size, config.time_step_rank, config.state_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)
        for end in ("", "_b"):
            self.add_module(f"conv1d{end}", nn.Conv1d(width, width, config.conv_kernel, groups=width))
            self.add_module(f"x_proj{end}", nn.Linear(width, rank + 2 * state, bias=False))
            self.add_module(f"dt_proj{end}", nn.Linear(rank, width))
        self.A_log, self.A_b_log = (nn.Parameter(torch.empty(width, state)) for _ in range(2))
        self.D, self.D_b = (nn.Parameter(torch.empty(width)) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch, tokens, hidden) -> (batch, tokens, hidden)."""
        xz = self.in_proj(tokens).transpose(1, 2)
        there = self._scan(xz, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        back = self._scan(xz.flip(-1), self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        mixed: Tensor = self.out_proj((there + back.flip(-1)).transpose(1, 2).to(tokens.dtype) / 2)
        return mixed

    def _scan(self, xz: Tensor, conv1d: Any, x_proj: Any, dt_proj: Any, A_log: Tensor, D: Tensor) -> Tensor:
        """From `xz` (batch, 2 * width, tokens) to (batch, width, tokens)."""
        x, z = xz.chunk(2, dim=1)
        x = causal_conv1d_fn(x.contiguous(), conv1d.weight.squeeze(1), conv1d.bias, activation="silu")
        config = self.config
        sizes = [config.time_step_rank, config.state_size, config.state_size]
        time_step, B, C = x_proj(x.transpose(1, 2)).split(sizes, dim=-1)
        scanned: Tensor = mamba_selective_scan(
            x,
            dt_proj(time_step).transpose(1, 2),
            -torch.exp(A_log.float()),
            B.transpose(1, 2),
            C.transpose(1, 2),
            D=D.float(),
            z=z,
            delta_softplus=True,
            use_mambapy=config.use_mambapy,
        )
        return scanned


class VisionMambaBlock(nn.Module):
    """Pre-norm and residual around a mixer.

    Args:
        config: the sizes.
    """

    def __init__(self, config: VisionMambaConfig) -> None:
        super().__init__()
        self.norm = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = BidirectionalMixer(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch, tokens, hidden) -> the same shape."""
        mixed: Tensor = self.mixer(self.norm(tokens))
        return tokens + mixed


class VisionMambaForImageClassification(PreTrainedModel):  # type: ignore[misc]
    """Patches, blocks, and a linear head on the class token or the mean.

    Args:
        config: the sizes; `num_labels` is the head's.
    """

    config_class = VisionMambaConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision_mamba"
    input_modalities = ("image",)
    _no_split_modules = ("VisionMambaBlock",)

    def __init__(self, config: VisionMambaConfig) -> None:
        super().__init__(config)
        if config.image_size % config.patch_size:
            raise ValueError(f"image_size={config.image_size} is not a multiple of patch_size={config.patch_size}")
        size, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.middle = patches // 2
        self.patch_embed = nn.Conv2d(config.num_channels, size, config.patch_size, stride=config.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, patches + int(config.class_token), size))
        self.cls_token = nn.Parameter(torch.empty(1, 1, size)) if config.class_token else None
        self.layers = nn.ModuleList(VisionMambaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm_f = MambaRMSNorm(size, eps=config.layer_norm_epsilon)
        self.head = nn.Linear(size, config.num_labels)
        self.post_init()

    def features(self, pixel_values: Tensor) -> Tensor:
        """What the head reads.

        Args:
            pixel_values: (batch, channels, height, width).

        Returns:
            (batch, hidden).
        """
        tokens: Tensor = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            token = self.cls_token.expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens[:, : self.middle], token, tokens[:, self.middle :]], dim=1)
        tokens = tokens + self.pos_embed
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.norm_f(tokens)
        return tokens.mean(1) if self.cls_token is None else tokens[:, self.middle]

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (batch, channels, height, width).
            labels: (batch,) class numbers; with them there is a cross-entropy loss.

        Returns:
            `logits` (batch, classes), and `loss`.
        """
        logits = self.head(self.features(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Mamba's start for the scans, out_proj scaled for the depth; Vim's for the rest."""
        std = self.config.initializer_range
        if isinstance(module, BidirectionalMixer):
            for end in ("", "_b"):
                _start_time_step(module.get_submodule(f"dt_proj{end}"))  # type: ignore[arg-type]
            states = torch.arange(1, self.config.state_size + 1, dtype=torch.float32).log()
            for A_log, D in ((module.A_log, module.D), (module.A_b_log, module.D_b)):
                init.copy_(A_log, states.to(A_log.device).expand_as(A_log))
                init.ones_(D)
            bound = (module.out_proj.in_features * self.config.num_hidden_layers) ** -0.5
            init.uniform_(module.out_proj.weight, -bound, bound)
        elif isinstance(module, VisionMambaForImageClassification):
            init.trunc_normal_(module.pos_embed, std=std)
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.head.weight, std=std)
            init.zeros_(module.head.bias)
        elif isinstance(module, MambaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)


def from_vim(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of Vim's code (`bimambav2`, class token in the middle) under the names that they have here.

    Args:
        state: its state dict, such as `torch.load(file, weights_only=True)["model"]`.

    Returns:
        For `VisionMambaForImageClassification.load_state_dict`, which refuses what does not fit.
    """
    return {name.replace("patch_embed.proj.", "patch_embed."): tensor for name, tensor in state.items()}


def _start_time_step(dt_proj: nn.Linear, shortest: float = 1e-3, longest: float = 0.1) -> None:
    """Mamba's own start: time steps spread evenly over the logarithm between two bounds, through softplus."""
    init.uniform_(dt_proj.weight, -(dt_proj.in_features**-0.5), dt_proj.in_features**-0.5)
    spread = torch.rand(dt_proj.out_features, device=dt_proj.bias.device)
    time_step = torch.exp(spread * (math.log(longest) - math.log(shortest)) + math.log(shortest)).clamp(min=1e-4)
    init.copy_(dt_proj.bias, time_step + torch.log(-torch.expm1(-time_step)))


AutoConfig.register(VisionMambaConfig.model_type, VisionMambaConfig, exist_ok=True)
AutoModelForImageClassification.register(VisionMambaConfig, VisionMambaForImageClassification, exist_ok=True)
