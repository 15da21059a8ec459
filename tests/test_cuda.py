"""A GPU computes what the CPU does, and half precision there trains, merges, decodes and is saved."""

from __future__ import annotations

import pytest
import torch
from helpers import TARGETS, build, inputs, logits, predict, randomise
from on_cuda import DEVICES, needs_gpu
from peft import PeftModel, get_peft_model, set_peft_model_state_dict

from lily import LilyConfig
from lily.bench import measure
from lily.bench.contestants import LORA, contestants
from lily.bench.subjects import Shape, llama
from lily.deploy.lora import as_lora
from lily.plan.options import ROUTINGS

pytestmark = pytest.mark.filterwarnings("ignore")

STRUCTURES = {"distinct": "permute+signs", "gain": "half-signs", "own_r": 2}
on_both = pytest.mark.parametrize("device", DEVICES)


def adapted(routing="token", device="cpu", dtype=torch.float32, **more):
    config = LilyConfig(
        r=4, stride_A=2, num_B=3, routing=routing, target_modules=TARGETS["llama"], task_type="CAUSAL_LM", **more
    )
    return randomise(get_peft_model(build("llama").to(dtype), config).to(device))


def padded(device="cpu"):
    batch = inputs("llama")
    batch["attention_mask"][0, :4] = 0
    return {name: tensor.to(device) for name, tensor in batch.items()}


@on_both
@pytest.mark.parametrize("more", [{}, STRUCTURES], ids=["plain", "structures"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_outputs_and_gradients_are_those_of_double_precision_on_the_cpu(routing, more, device):
    reference, model = adapted(routing, **more).double().train(), adapted(routing, device, **more).train()
    wanted, got = logits(reference, padded()), logits(model, padded(device))
    torch.testing.assert_close(got.double().cpu(), wanted, rtol=1e-3, atol=1e-3)
    wanted.square().mean().backward()
    got.square().mean().backward()
    found = dict(model.named_parameters())
    for name, p in reference.named_parameters():
        if p.requires_grad:
            scale = p.grad.abs().max().clamp(min=1e-6)
            assert (found[name].grad.double().cpu() - p.grad).abs().max() < 5e-3 * scale, name


@on_both
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("routing", ["token", "static"])
def test_a_half_precision_base_is_trained(routing, checkpointing, device):
    model = adapted(routing, device, torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    batch = padded(device)
    losses = []
    for _ in range(20):
        with torch.autocast(device, torch.bfloat16):
            loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert {p.dtype for p in trained} == {torch.float32}


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_merging_rounds_once_and_unmerging_is_bit_exact(dtype, device):
    model = adapted("static", device, dtype).eval()
    before, batch = {k: v.clone() for k, v in model.state_dict().items()}, padded(device)
    wanted = predict(model, batch)
    model.merge_adapter()
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    assert (predict(model, batch) - wanted).abs().max() < tolerance * wanted.abs().max()
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@on_both
@pytest.mark.parametrize("routing", ["token", "static"])
def test_decoding_with_a_cache_gives_what_decoding_without_one_does(routing, device):
    model = adapted(routing, device).eval()
    prompt = {"input_ids": inputs("llama")["input_ids"].to(device)}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    texts = [
        model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)


@on_both
def test_an_adapter_saved_there_is_loaded_on_the_cpu_and_exported(device, tmp_path):
    model = adapted("static", device, **STRUCTURES).eval()
    wanted = predict(model, padded(device)).cpu()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    torch.testing.assert_close(predict(again, padded()), wanted, rtol=1e-3, atol=1e-3)
    export = as_lora(model)
    lora = get_peft_model(build("llama"), export.config).eval()
    set_peft_model_state_dict(lora, {name: tensor.cpu() for name, tensor in export.state_dict().items()})
    torch.testing.assert_close(predict(lora, padded()), wanted, rtol=1e-3, atol=1e-3)


@needs_gpu
def test_a_training_step_needs_no_more_memory_than_lora_s():
    subject = llama(Shape(512, 8, 4, 256), "cuda", torch.bfloat16, vocabulary=1000)
    made = contestants(subject, {"r": 32, "num_A": 2, "num_B": 2}, [LORA, "Lily token", "Lily static"])
    runs = {c.name: measure.step_memory(subject, c) for c in made}
    found = measure.interleave(runs, LORA, rounds=1)
    assert max(outcome.ratio for outcome in found.values()) <= 1.01
