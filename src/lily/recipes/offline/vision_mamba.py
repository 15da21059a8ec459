"""A bidirectional Mamba over image patches, in the structure of Vision Mamba (Vim, arXiv 2401.09417).

Each layer scans the patches forward and backward with separate scans; the input and output projections are shared, and
the two results are averaged. Parameter names in a layer are those of Vim's code (`in_proj`, `x_proj`, `x_proj_b`,
`dt_proj`, `dt_proj_b`, ...). Convolution and scan are functions of transformers' Mamba, with its CUDA kernels if they
are installed. Importing this module registers the model with transformers' Auto classes, without remote code.

Differences from Vim: every projection is called (Vim's fused kernels read the weights of `x_proj` and `dt_proj`, and
its `in_proj` and `out_proj` are products with a weight), so all can be adapted; `dt_proj` adds its bias itself,
not inside the scan; and there is no stochastic depth.
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
    """Configuration of a `VisionMambaForImageClassification`. The defaults are Vim-S.

    Args:
        image_size: height and width in pixels.
        patch_size: side of a patch.
        num_channels: channels of the image.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of layers.
        state_size: state size of the scan.
        conv_kernel: kernel size of the convolution before the scan.
        expand: ratio of the scan's width to `hidden_size`.
        time_step_rank: rank of the time step's projection; None: a sixteenth of `hidden_size`.
        class_token: classify by a token in the middle of the patches, as Vim does; False: by the mean over patches.
        layer_norm_epsilon: epsilon of the RMS norms.
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
    """A forward and a backward scan between shared projections."""

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
        forward = self._scan(xz, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        backward = self._scan(xz.flip(-1), self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        mixed: Tensor = self.out_proj((forward + backward.flip(-1)).transpose(1, 2).to(tokens.dtype) / 2)
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
    """Pre-norm and residual connection around a mixer."""

    def __init__(self, config: VisionMambaConfig) -> None:
        super().__init__()
        self.norm = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = BidirectionalMixer(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch, tokens, hidden) -> the same shape."""
        mixed: Tensor = self.mixer(self.norm(tokens))
        return tokens + mixed


class VisionMambaForImageClassification(PreTrainedModel):  # type: ignore[misc]
    """Patch embedding, layers, and a linear head on the class token or the mean."""

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
        """The input of the head: (batch, channels, height, width) -> (batch, hidden)."""
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
            labels: (batch,) class indices, for a cross-entropy loss.

        Returns:
            `logits` (batch, classes), and `loss`.
        """
        logits = self.head(self.features(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Mamba's initialization for the scans, out_proj scaled by depth; Vim's for the rest."""
        std = self.config.initializer_range
        if isinstance(module, BidirectionalMixer):
            for end in ("", "_b"):
                _init_time_step(module.get_submodule(f"dt_proj{end}"))  # type: ignore[arg-type]
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
    """Rename the weights of Vim's code (`bimambav2`, class token in the middle) for this model.

    Args:
        state: its state dict, such as `torch.load(file, weights_only=True)["model"]`.

    Returns:
        A state dict for `VisionMambaForImageClassification`.
    """
    return {name.replace("patch_embed.proj.", "patch_embed."): tensor for name, tensor in state.items()}


def _init_time_step(dt_proj: nn.Linear, shortest: float = 1e-3, longest: float = 0.1) -> None:
    """Mamba's initialization: time steps log-uniform between two bounds, through softplus."""
    init.uniform_(dt_proj.weight, -(dt_proj.in_features**-0.5), dt_proj.in_features**-0.5)
    spread = torch.rand(dt_proj.out_features, device=dt_proj.bias.device)
    time_step = torch.exp(spread * (math.log(longest) - math.log(shortest)) + math.log(shortest)).clamp(min=1e-4)
    init.copy_(dt_proj.bias, time_step + torch.log(-torch.expm1(-time_step)))


AutoConfig.register(VisionMambaConfig.model_type, VisionMambaConfig, exist_ok=True)
AutoModelForImageClassification.register(VisionMambaConfig, VisionMambaForImageClassification, exist_ok=True)
