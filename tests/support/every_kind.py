"""A tiny model of transformers with every kind of layer that Lily adapts, and a LoRA that equals each adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import randomise
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lily import LilyConfig, export
from lily.layers.find import layers_of

WIDTH, EXPERTS, VOCAB = 8, 3, 13


class Own(nn.Module):
    """A matrix and stacked experts as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.up = nn.Parameter(torch.randn(EXPERTS, 6, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 6) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        experts = [torch.tanh(x @ self.up[e].T) @ self.down[e].T for e in range(EXPERTS)]
        return x @ self.matrix.T + sum(experts)


class Side(nn.Module):
    """A module whose parallel adapter is a LoRA of the layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.transposed = Conv1D(WIDTH, WIDTH)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.line = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.cube = nn.Conv3d(1, 1, (1, 3, 3), padding=(0, 1, 1))
        self.fused = nn.Linear(WIDTH, 2 * WIDTH)
        self.side = Side()
        self.own = Own()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.linear(x)) + self.transposed(x)
        x = x + self.conv(x.unsqueeze(1)).squeeze(1)
        x = x + torch.tanh(self.line(x.mT)).mT + torch.tanh(self.cube(x[None, None])[0, 0])
        left, right = self.fused(x).chunk(2, dim=-1)
        x = x + torch.tanh(left) * right
        return x + self.side(x) + self.own(x)


class EveryConfig(PretrainedConfig):
    model_type = "every-kind"


class EveryKind(PreTrainedModel):
    config_class = EveryConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own values."""

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# kind -> options of Lily, options of the LoRA that has the same updates
KINDS = {
    "linear": ({"target_modules": ["linear"]}, {"target_modules": ["linear"]}),
    "Conv1D": ({"target_modules": ["transposed"]}, {"target_modules": ["transposed"], "fan_in_fan_out": True}),
    "conv": ({"target_modules": ["conv", "line", "cube"]}, {"target_modules": ["conv", "line", "cube"]}),
    "embedding": ({"target_modules": ["embed"]}, {"target_modules": ["embed"]}),
    "slice": (
        {"target_slices": {"fused": {"left": [0, WIDTH], "right": [WIDTH, 2 * WIDTH]}}},
        {"target_modules": ["fused"], "r": 4, "lora_alpha": 4},  # both slices of a layer are one LoRA of twice the rank
    ),
    "parallel": ({"parallel_modules": ["side"]}, {"target_modules": ["side.inner"]}),
    "parameter": (
        {"target_modules": [], "target_parameters": ["own.matrix"]},
        {"target_modules": [], "target_parameters": ["own.matrix"]},
    ),
    "experts": (
        {"target_modules": [], "target_parameters": ["own.up", "own.down"]},
        {"target_modules": [], "target_parameters": ["own.up", "own.down"]},
    ),
    "saved module": (
        {"target_modules": ["linear"], "modules_to_save": ["head"]},
        {"target_modules": ["linear"], "modules_to_save": ["head"]},
    ),
}


def base(seed: int = 0) -> EveryKind:
    torch.manual_seed(seed)
    return EveryKind(EveryConfig()).eval()


def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(3))


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids())


def lily_config(kind: str, **options: object) -> LilyConfig:
    return LilyConfig(
        **{"r": 2, "stride_A": 2, "num_B": 2, "routing": "static", "scaling": 1.0, **KINDS[kind][0], **options}
    )


def lora_config(kind: str, **options: object) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 2, **KINDS[kind][1], **options})


def write_pair(kind: str, folder: Path, seed: int, **options: object) -> None:
    """Write a random static adapter to `folder / "lily"` and its LoRA to `folder / "lora"`."""
    model = randomise(get_peft_model(base(), lily_config(kind, **options)), scale=0.4, seed=seed).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save." in name:
                p.mul_(1 + seed)
    model.save_pretrained(folder / "lily")
    if kind == "parallel":
        _write_parallel(model, folder / "lora")
    else:
        export.write_lora(export.as_lora(model), folder / "lora")


def _write_parallel(model: PeftModel, folder: Path) -> None:
    """The LoRA of `Side.inner`: the package refuses to export an adapter that belongs to no weight."""
    lora = get_peft_model(base(), lora_config("parallel"))
    lora.save_pretrained(folder)
    tensors = {}
    for name, layer in layers_of(model.base_model.model).items():
        factors = layer.factors("default")
        tensors[f"base_model.model.{name}.inner.lora_A.weight"] = factors.A.clone()
        tensors[f"base_model.model.{name}.inner.lora_B.weight"] = (factors.scaling * factors.B.mT).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
