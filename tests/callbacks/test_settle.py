"""Settling: what the routing is at each moment of training, and that the end is static."""

from __future__ import annotations

import warnings

import pytest
import torch
from adapters import adapted, base_bits, config_for, layers, same_bits
from helpers import build, inputs, predict, processes, randomise
from peft import PeftModel
from settling import ROWS, arguments, fresh
from transformers import Trainer

import lily
from lily import LilyConfig, LilyError, export
from lily.callbacks.settle import share_settled
from lily.functional import route
from lily.layers.bank import Settled

pytestmark = [pytest.mark.sample(every=10), pytest.mark.filterwarnings("ignore:routing=.* on a causal model")]


class Watch(lily.SettleCallback):
    """Also notes, at each step, how far the routing has settled and what the layers' vectors are."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shares, self.vectors = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        self.shares.append(self.settling.adapted.config.settled)
        self.vectors.append(torch.stack([v.detach().softmax(0) for v in self.settling.logits]))


def trained(folder, model=None, start=0.4, end=0.7, resume=None, callback=None, **options):
    model = model or fresh()
    callback = callback or Watch(start, end)
    trainer = Trainer(model=model, args=arguments(folder, **options), train_dataset=ROWS, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return model.eval(), callback


def test_the_schedule_goes_from_0_to_1_between_its_fractions():
    assert [share_settled(f, 0.5, 0.75) for f in (0.0, 0.5, 0.625, 0.75, 1.0)] == [0, 0, 0.5, 1, 1]


def test_training_settles_and_ends_static(tmp_path):
    model, watch = trained(tmp_path)
    assert watch.shares == [share_settled(step / 20, 0.4, 0.7) for step in range(20)]
    config = model.peft_config["default"]
    assert (config.routing, config.settled) == ("static", None)
    assert not any("lily_router.default" in n for n, _ in model.named_parameters())
    # after the end the vectors are learned like any other parameter
    assert not torch.equal(watch.vectors[14], watch.vectors[-1])
    expected = predict(model, inputs("llama"))
    before = base_bits(model)
    model.merge_adapter()
    assert torch.allclose(predict(model, inputs("llama")), expected, atol=1e-5)
    model.unmerge_adapter()
    assert same_bits(model, before)


def test_a_settled_adapter_exports_without_drift(tmp_path):
    model, _ = trained(tmp_path / "run")
    expected = predict(model, inputs("llama"))
    export.write_lora(export.as_lora(model), tmp_path / "lora")
    lora = PeftModel.from_pretrained(build("llama"), tmp_path / "lora").eval()
    assert torch.allclose(predict(lora, inputs("llama")), expected, atol=1e-5)


def test_until_it_starts_training_is_what_it_would_be_without(tmp_path):
    plain = fresh()
    Trainer(model=plain, args=arguments(tmp_path, max_steps=8), train_dataset=ROWS).train()
    settling = fresh()

    class Stop(Watch):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            control.should_training_stop = state.global_step == 8

    Trainer(
        model=settling,
        args=arguments(tmp_path, lr_scheduler_type="constant"),
        train_dataset=ROWS,
        callbacks=[Stop(0.4, 0.7)],
    ).train()
    reference = fresh()
    Trainer(
        model=reference, args=arguments(tmp_path, max_steps=8, lr_scheduler_type="constant"), train_dataset=ROWS
    ).train()
    for (name, a), (_, b) in zip(
        ((n, p) for n, p in settling.named_parameters() if "lily_logits" not in n),
        reference.named_parameters(),
        strict=True,
    ):
        assert torch.equal(a, b), name
    assert settling.peft_config["default"].settled == 0.0
    assert not torch.equal(predict(plain.eval(), inputs("llama")), predict(settling.eval(), inputs("llama")))


def test_the_running_mean_is_that_of_the_routing():
    model = adapted("llama", routing="token").train()
    settling = lily.Settling(model, total_steps=100, start=0.2, end=0.9)
    settling.step(15)  # the window opens
    seen = {}

    def keep_input(layer, args, _):
        seen[id(layer)] = args[0].detach()

    handles = [layer.register_forward_hook(keep_input) for layer in layers(model).values()]
    batch = inputs("llama")
    batch["attention_mask"][0, 4:] = 0
    model(**batch)
    for handle in handles:
        handle.remove()
    settling.step(16)
    keep = batch["attention_mask"].bool()
    for layer in layers(model).values():
        A, _ = layer.tensors_of("default")
        p = route((seen[id(layer)][keep] @ A.T).double(), layer.router_of("default").double())
        assert torch.allclose(layer.logits_of("default").double().softmax(0), p.mean(0), atol=1e-5)


def test_half_way_the_weights_are_half_of_each():
    model = adapted("plain", routing="token", settled=0.5)
    x = torch.randn(2, 3, 8)
    layer = next(iter(layers(model).values()))
    A, B = layer.tensors_of("default")
    h = x @ A.T
    w = (route(h, layer.router_of("default")) + layer.logits_of("default").softmax(0)) / 2
    expected = torch.einsum("bte,btr,ero->bto", w, h, B) * layer.settings["default"].scaling
    assert torch.allclose(layer.update_of("default", x), expected, atol=1e-6)


def test_a_checkpoint_from_the_middle_loads_as_what_it_is(tmp_path):
    model = randomise(fresh(settled=0.25)).eval()
    for settled in (0.0, 0.25, 1.0):
        settling = lily.Settling(model, total_steps=100, start=0.0, end=0.99)
        model.peft_config["default"].settled = settled
        settling.adapted.bank.settled["default"] = Settled(settled)
        model.save_pretrained(tmp_path / str(settled))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|nexpected).*")
            back = PeftModel.from_pretrained(build("llama"), tmp_path / str(settled)).eval()
        assert torch.equal(predict(back, inputs("llama")), predict(model, inputs("llama")))
        expected = ("static", None) if settled == 1 else ("token", settled)
        assert (back.peft_config["default"].routing, back.peft_config["default"].settled) == expected


@pytest.mark.parametrize("at", [4, 11, 16])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(at, tmp_path):
    whole, _ = trained(tmp_path / "whole")

    class Stop(Watch):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == at:
                control.should_training_stop = control.should_save = True

    trained(tmp_path / "cut", callback=Stop(0.4, 0.7))
    resumed, watch = trained(tmp_path / "cut", resume=str(tmp_path / "cut" / f"checkpoint-{at}"))
    assert watch.shares == [share_settled(step / 20, 0.4, 0.7) for step in range(at, 20)]
    assert torch.allclose(predict(resumed, inputs("llama")), predict(whole, inputs("llama")), atol=1e-5)


OTHER_ROWS = [{**row, "input_ids": torch.full_like(row["input_ids"], 7)} for row in ROWS]


def evaluating(folder, resume=None, stop=None):
    """A run that evaluates and saves at step 11 of 20, between `start` and `end`."""

    class Stop(Watch):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == stop:
                control.should_training_stop = True

    options = {"eval_strategy": "steps", "eval_steps": 11, "save_strategy": "steps", "save_steps": 11}
    watch = Stop(0.4, 0.7)
    Trainer(
        model=(model := fresh()),
        args=arguments(folder, **options),
        train_dataset=ROWS,
        eval_dataset=OTHER_ROWS,
        callbacks=[watch],
    ).train(resume_from_checkpoint=resume)
    return model.eval(), watch


def test_a_run_that_is_resumed_at_an_evaluation_ends_bit_identical(tmp_path):
    whole, watch = evaluating(tmp_path / "whole")
    evaluating(tmp_path / "cut", stop=11)
    resumed, again = evaluating(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-11"))
    assert 0 < again.shares[0] < 1
    assert all(torch.equal(a, b) for a, b in zip(watch.vectors[11:], again.vectors, strict=True))
    assert torch.equal(predict(resumed, inputs("llama")), predict(whole, inputs("llama")))


def test_evaluating_leaves_training_as_it_is(tmp_path):
    plain, watch = trained(tmp_path / "plain")
    evaluated, other = evaluating(tmp_path / "evaluated")
    assert all(torch.equal(a, b) for a, b in zip(watch.vectors, other.vectors, strict=True))
    assert torch.equal(predict(plain, inputs("llama")), predict(evaluated, inputs("llama")))


def test_training_in_eval_mode_settles_on_nothing_and_says_so():
    model = fresh().eval()
    settling = lily.Settling(model, total_steps=10, start=0.3, end=0.6)
    settling.step(3)
    model(**inputs("llama"))
    with pytest.warns(UserWarning, match=r"settling recorded no token since the last step.*call model.train\(\)"):
        settling.step(4)


def test_accumulation_counts_optimizer_steps(tmp_path):
    whole, watch = trained(tmp_path, per_device_train_batch_size=4)
    parts, other = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert watch.shares == other.shares
    for a, b in zip(watch.vectors, other.vectors, strict=True):
        assert torch.allclose(a, b, atol=1e-3)
    assert torch.allclose(predict(whole, inputs("llama")), predict(parts, inputs("llama")), atol=5e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_works(tmp_path, reentrant):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain, _ = trained(tmp_path)
    checkpointed, _ = trained(tmp_path, **options)
    assert torch.allclose(predict(plain, inputs("llama")), predict(checkpointed, inputs("llama")), atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_trls_trainer_settles_too(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from recipes_helpers import tokenizer

    config = trl.SFTConfig(**arguments(tmp_path).to_dict() | {"max_length": 16})
    trainer = trl.SFTTrainer(
        model=build("llama"),
        args=config,
        train_dataset=datasets.Dataset.from_list([{"input_ids": r["input_ids"].tolist()} for r in ROWS]),
        processing_class=tokenizer(chat=False),
        peft_config=config_for("llama"),
        callbacks=[lily.SettleCallback(0.4, 0.7)],
    )
    trainer.train()
    assert trainer.model.peft_config["default"].routing == "static"
    trainer.model.merge_adapter()


@pytest.mark.parametrize("routing", ["token", "sequence", "batch"])
def test_ones_own_loop_settles_every_dynamic_routing(routing):
    model = fresh(routing=routing).train()
    settling = lily.Settling(model, total_steps=10, start=0.3, end=0.6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(10):
        settling.step(step)
        model(**inputs("llama", seed=step), labels=inputs("llama", seed=step)["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    settling.finish()
    assert model.peft_config["default"].routing == "static"
    assert torch.isfinite(predict(model.eval(), inputs("llama"))).all()


@pytest.mark.parametrize(("num_B", "other"), [(2, 1), (1, 2)])
def test_groups_with_one_B_stay_as_they_are(num_B, other):
    targets = ["q_proj", "v_proj"]
    options = {"num_B": num_B, "group_options": {"v_proj": {"num_B": other}}, "target_modules": targets}
    model = randomise(fresh(routing="token", **options)).train()
    LilyConfig(settled=0.5, task_type="CAUSAL_LM", **options)  # as a checkpoint of the middle has it
    settling = lily.Settling(model, total_steps=10, start=0.3, end=0.6)
    routed = "q_proj" if num_B > 1 else "v_proj"
    assert len(settling.logits) == sum(routed in name for name in layers(model))
    for step in range(10):
        settling.step(step)
        model(**inputs("llama", seed=step))
    settling.finish()
    expected = predict(model.eval(), inputs("llama"))
    model.merge_adapter()
    assert torch.allclose(predict(model, inputs("llama")), expected, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again_at_every_step():
    model = adapted("plain", routing="token", settled=0.0)
    settling = lily.Settling(model, total_steps=100, start=0.0, end=0.5)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(2, 3, 8)
    for step in range(51, -1, -1):
        settling.step(step)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert counter.frame_count <= 3


def test_a_second_training_says_that_there_is_nothing_to_settle(tmp_path):
    trainer = Trainer(
        model=fresh(), args=arguments(tmp_path), train_dataset=ROWS, callbacks=[lily.SettleCallback(0.4, 0.7)]
    )
    trainer.train()
    with pytest.raises(LilyError, match="static already; there is nothing to settle"):
        trainer.train()


def test_training_that_ends_too_early_says_so():
    model = fresh()
    settling = lily.Settling(model, total_steps=10)
    settling.step(7)
    with pytest.raises(LilyError, match=r"training ended before the routing settled \(settled=0.5\)"):
        settling.finish()


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.8, 0.6), (-0.1, 0.5), (0.5, 1.0)])
def test_bad_fractions_are_refused(start, end):
    for make in (lily.SettleCallback, lambda *a: lily.Settling(fresh(), 10, *a)):
        with pytest.raises(LilyError, match="expected fractions of training, 0 <= start < end < 1"):
            make(start, end)


def test_what_is_static_has_nothing_to_settle():
    for options in ({"routing": "static"}, {"routing": "uniform"}, {"num_B": 1}):
        with pytest.raises(LilyError, match="there is nothing to settle"):
            lily.Settling(fresh(**options), 10)
        with pytest.raises(LilyError, match="there is nothing to settle"):
            LilyConfig(settled=0.0, task_type="CAUSAL_LM", **options)
    with pytest.raises(LilyError, match="give a number from 0"):
        LilyConfig(settled=1.5)


def test_an_optimizer_made_too_early_is_refused(tmp_path):
    model = fresh()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=ROWS,
        callbacks=[lily.SettleCallback()],
        optimizers=(optimizer, None),
    )
    with pytest.raises(LilyError, match="the optimizer was created before the adapter got its static weights"):
        trainer.train()


def test_a_best_checkpoint_from_before_is_not_brought_back(tmp_path):
    options = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 5}
    trainer = Trainer(
        model=fresh(),
        args=arguments(tmp_path, eval_steps=5, **options),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        callbacks=[lily.SettleCallback()],
    )
    with pytest.raises(LilyError, match="load_best_model_at_end=True could bring back"):
        trainer.train()


def settle_on_own_rows(rank):
    model = fresh(settled=0.0)
    settling = lily.Settling(model, total_steps=20, start=0.4, end=0.7)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    vectors = []
    for step in range(20):
        settling.step(step)
        batch = inputs("llama", seed=100 * rank + step)
        parallel(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        vectors.append(torch.stack([v.detach().clone() for v in settling.logits]))
    settling.finish()
    return torch.stack(vectors).tolist(), predict(model.eval(), inputs("llama")).tolist()


@pytest.mark.slow
def test_two_processes_settle_on_the_same_weights():
    first, second = processes(settle_on_own_rows)
    assert first == second
