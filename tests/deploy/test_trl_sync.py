"""TRL's asynchronous trainers send a static adapter to vLLM as a LoRA: no base weight is merged or touched."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from adapters import adapted, base_bits, same_bits
from helpers import build, inputs, predict
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

from lily import export

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

from trl.experimental.async_grpo import async_grpo_trainer as trainer  # noqa: E402

if not hasattr(trainer, "save_lora_adapter"):
    pytest.skip("this TRL merges at every synchronization", allow_module_level=True)

SERVER = {"lora_config": {"max_lora_rank": 16, "max_loras": 3}, "parallel_config": {"data_parallel_size": 1}}
ARGS = SimpleNamespace(max_staleness=1)


class Server:
    """The calls that a vLLM server would get."""

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}

    def pause(self) -> None:
        """Nothing runs."""

    resume = pause

    def load_lora_adapter(self, name: str, folder: str) -> None:
        self.loaded[name] = folder

    def unload_lora_adapter(self, name: str) -> None:
        del self.loaded[name]


def training(model: PeftModel, folder: Path) -> Any:
    """What TRL's synchronization reads of its trainer."""
    return SimpleNamespace(
        model=model, accelerator=Accelerator(cpu=True), model_version=0, vllm_client=Server(), args=ARGS,
        rollout_worker=None, _lora_dir=str(folder), _lora_name="policy", _adapter_name="default",
    )  # fmt: skip


def test_each_synchronization_publishes_the_policy_as_it_is(tmp_path):
    model = adapted("llama", routing="static", stride_A=2, num_B=3)
    before = base_bits(model)
    assert trainer.select_adapter_sync(SERVER, model, ARGS)
    run = training(model, tmp_path)
    for version in (1, 2, 3):
        with torch.no_grad():  # a step of training
            for name, p in model.named_parameters():
                if "lily_" in name:
                    p.mul_(1.1)
        trainer.AsyncGRPOTrainer._sync_weight_lora(run, 0.0)
        assert run.model_version == version
        served = PeftModel.from_pretrained(build("llama"), run.vllm_client.loaded[f"policy-v{version}"]).eval()
        assert isinstance(served.peft_config["default"], LoraConfig)
        assert torch.allclose(predict(served, inputs("llama")), predict(model, inputs("llama")), atol=1e-4)
        assert same_bits(model, before)
    assert set(run.vllm_client.loaded) == {"policy-v2", "policy-v3"}
    assert {path.name for path in tmp_path.iterdir()} >= {"policy-v2", "policy-v3"}


def test_the_state_in_memory_is_what_the_folder_has():
    model = adapted("llama", routing="static")
    before = base_bits(model)
    now = export.as_lora(model, target="vllm")
    assert now.config.r == 8  # the smallest that vLLM accepts
    served = get_peft_model(build("llama"), now.config)
    assert not set_peft_model_state_dict(served, now.state_dict()).unexpected_keys
    assert torch.allclose(predict(served.eval(), inputs("llama")), predict(model, inputs("llama")), atol=1e-4)
    assert same_bits(model, before)
    assert now.size < sum(t.numel() * t.element_size() for t in model.get_base_model().state_dict().values())


def test_a_server_or_adapter_that_cannot_is_told_so_as_for_lora():
    PartialState()  # TRL's warning is logged by accelerate, which a trainer has set up
    model = adapted("llama", routing="static", r=24)
    with pytest.raises(ValueError, match="--max-lora-rank 32"):
        trainer.select_adapter_sync(SERVER, model, ARGS)
    with pytest.raises(ValueError, match=r"depends on the data.*lily\.collapse"):
        trainer.validate_lora_for_vllm_sync(adapted("llama", routing="token"))
    assert not trainer.select_adapter_sync(SERVER, adapted("llama", routing="token"), ARGS)  # merges, with a warning


def test_a_lora_goes_trls_own_way(tmp_path):
    model = get_peft_model(build("llama"), LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    assert trainer.select_adapter_sync(SERVER, model, ARGS)
    trainer.AsyncGRPOTrainer._sync_weight_lora(run := training(model, tmp_path), 0.0)
    served = PeftModel.from_pretrained(build("llama"), run.vllm_client.loaded["policy-v1"])
    assert torch.allclose(predict(served, inputs("llama")), predict(model, inputs("llama")), atol=1e-6)
