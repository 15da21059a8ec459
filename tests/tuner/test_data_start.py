"""The start from data: each A gets the main directions of what its layers receive, collected here by hand."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from every_kind import KINDS, VOCAB, base, lily_config, output
from helpers import build, inputs, processes
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict
from torch import nn

import lily
from lily import LilyConfig, LilyError, initialize_from_data
from lily.tuner.adapter import find
from lily.tuner.base_inputs import base_inputs

ROUTINGS = ["token", "sequence", "batch", "static", "uniform"]
MODULES = {"linear": "linear", "Conv1D": "transposed", "conv": "conv", "slice": "fused", "parallel": "side"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:routing=.* on a causal model"),
]


def batches(count=3, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(VOCAB, (3, 5), generator=generator)} for _ in range(count)]


def by_hand(kind, data):
    """Module -> the vectors that an A on it multiplies, from hooks on the base model alone."""
    model, seen = base(), {}
    for name, module in model.named_modules():
        if name.endswith(f".{MODULES[kind]}"):

            def keep(_, args, __, name=name):
                seen.setdefault(name, []).append(patches(args[0]) if kind == "conv" else args[0].flatten(0, 1))

            module.register_forward_hook(keep)
    for batch in data:
        output_of(model, batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def patches(x):
    """Every 3x3 window of the padded images (batch, 1, height, width)."""
    padded = F.pad(x, (1, 1, 1, 1))
    height, width = x.shape[-2:]
    windows = [padded[:, :, i : i + 3, j : j + 3].flatten(1) for i in range(height) for j in range(width)]
    return torch.cat(windows)


@torch.no_grad()
def output_of(model, batch):
    return model(**batch)


def span(rows):
    rows = torch.linalg.qr(rows.T)[0].T
    return rows.T @ rows


def directions(X, rank):
    return torch.linalg.svd(X.double(), full_matrices=False)[2][:rank].float()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", MODULES)
def test_A_spans_the_top_directions_of_the_inputs_of_all_layers_that_share_it(kind, routing):
    options = {"distinct": "permute+signs", "gain": "ones"} if routing == "token" else {}
    options |= {"target_modules": ["conv"]} if kind == "conv" else {}  # the windows of `patches` have two dimensions
    model = get_peft_model(base(), lily_config(kind, routing=routing, own_r=1, init_weights="data", **options))
    report = initialize_from_data(model, batches(), tau=1.1)
    assert (report.batches, report.converged) == (3, False)
    seen, adapted = by_hand(kind, batches()), find(model)
    for number, (group, names) in enumerate(adapted.plan.blocks):
        A = adapted.bank.lily_A["default"][number].detach()
        of = [seen[name.removesuffix(".left").removesuffix(".right")] for name in names]
        pooled = torch.cat(of)
        V = directions(pooled, group.r)
        assert torch.allclose(span(A), V.T @ V, atol=2e-3)
        assert torch.allclose(A @ A.T, A[0].square().sum() * torch.eye(group.r), atol=1e-6)  # orthogonal, of one norm
        default = pooled.square().sum(1).mean() / (3 * group.in_features)
        assert torch.allclose((pooled @ A.T).square().mean(), default, rtol=1e-3)
        share = (pooled @ V.T).square().sum() / pooled.square().sum()
        assert report.explained[names[0]] == pytest.approx(float(share), rel=1e-3)
        for name, X in zip(names, of, strict=True):
            own = adapted.layers[name].lily_own_A["default"].weight.detach()
            rest = directions(X - X @ V.T @ V, 1)
            assert torch.allclose(span(own), rest.T @ rest, atol=5e-3)
            assert torch.allclose(own.norm(), A[0].norm())


@pytest.mark.parametrize("kind", MODULES)
def test_an_adapter_after_it_changes_nothing_and_leaves_the_model_as_it_was(kind):
    model = get_peft_model(base(), lily_config(kind, routing="sequence", own_r=1, init_weights="data"))
    model.train()
    model.base_model.model.blocks[0].eval()
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    before = (modes(model), hooks(model), trained(model), torch.get_rng_state())
    shuffled = torch.utils.data.DataLoader([b["input_ids"][0] for b in batches()], batch_size=2, shuffle=True)
    initialize_from_data(model, shuffled, forward=lambda m, ids: m(input_ids=ids))
    after = (modes(model), hooks(model), trained(model), torch.get_rng_state())
    assert all(torch.equal(b, a) if isinstance(b, torch.Tensor) else b == a for b, a in zip(before, after, strict=True))
    assert torch.equal(first.grad, torch.ones_like(first))
    model.eval()
    assert torch.equal(output(model), output(base()))


def modes(model):
    return {name: m.training for name, m in model.named_modules()}


def hooks(model):
    """The hooks of every module, besides the warning of an adapter that has not been started."""
    counted = {name: (m._forward_pre_hooks, m._forward_hooks) for name, m in model.named_modules()}
    return {
        name: [sorted(type(getattr(h, "__self__", h)).__name__ for h in on.values() if not waits(h)) for on in pair]
        for name, pair in counted.items()
    }


def waits(hook):
    return type(hook).__name__ == "Awaiting"


def trained(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_padding_does_not_count(routing):
    config = LilyConfig(r=4, routing=routing, target_modules=["query"], init_weights="data")
    model = get_peft_model(build("bert"), config)
    batch = inputs("bert")
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 4:] = 0
    batch["attention_mask"][1, 7:] = 0
    plain, seen = build("bert").eval(), {}
    for name, module in plain.named_modules():
        if name.endswith("query"):
            module.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0]}))
    output_of(plain, batch)
    initialize_from_data(model, [batch])
    adapted = find(model)
    for name, layer in adapted.layers.items():
        X = seen[name][batch["attention_mask"] == 1]
        V = directions(X, 4)
        A = adapted.bank.pair("default", layer.settings["default"].slot)[0].detach()
        assert torch.allclose(span(A), V.T @ V, atol=2e-3)
        everything = directions(seen[name].flatten(0, 1), 4)
        assert not torch.allclose(span(A), everything.T @ everything, atol=2e-2)


class Read(nn.Module):
    """Convolutions over the positions of texts."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.one = nn.Conv1d(6, 6, 3, padding=1)
        self.divided = nn.Conv1d(6, 6, 3, padding=1, groups=2)

    def forward(self, input_ids, attention_mask=None):
        return self.divided(self.one(self.embed(input_ids).mT)).mT


@pytest.mark.parametrize("tokens", [5, 6])  # as many as channels, too
def test_padding_of_a_convolution_does_not_count(tokens):
    model = get_peft_model(Read(), LilyConfig(r=2, num_B=1, target_modules=["one", "divided"], init_weights="data"))
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, 3:] = 0
    seen = {}
    with base_inputs(model, find(model, None), lambda name, rows: seen.update({name: len(rows)})):
        model(input_ids=torch.ones(2, tokens, dtype=torch.long), attention_mask=mask)
    assert seen == {"one": tokens + 3, "divided": 2 * (tokens + 3)}


def test_rows_of_several_texts_count_once():
    model = get_peft_model(
        build("llama"), LilyConfig(r=2, num_B=1, target_modules=["q_proj"], init_weights="data", task_type="CAUSAL_LM")
    )
    packed = {"input_ids": torch.arange(7)[None], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])}
    seen = {}
    with base_inputs(model, find(model, None), lambda name, rows: seen.update({name: len(rows)})):
        model(**packed)
    assert set(seen.values()) == {7}
    assert initialize_from_data(model, [packed]).batches == 1
    assert lily.null_space(model, [packed], rank=1).residual() < 1e-5


def test_the_directions_are_those_of_pefts_eva_where_the_inputs_have_mean_zero():
    def fresh():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 2))

    half = torch.randn(200, 32) * 0.7 ** torch.arange(32)
    data = [torch.cat((half, -half))]
    eva = LoraConfig(r=4, target_modules=["0"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    theirs = get_eva_state_dict(fresh(), data, eva, lambda m, x: m(x), None, None, show_progress_bar=False)["0"]
    model = get_peft_model(fresh(), LilyConfig(r=4, num_B=1, target_modules=["0"], init_weights="data"))
    initialize_from_data(model, data)
    A = model.lily_bank.lily_A["default"][0].detach()
    cosines = torch.cosine_similarity(A, theirs.float())
    assert torch.allclose(cosines.abs(), torch.ones(4), atol=1e-3)


def test_it_stops_when_the_directions_have_converged_or_at_max_batches():
    def report(**options):
        model = get_peft_model(base(), lily_config("linear", init_weights="data"))
        return initialize_from_data(model, 20 * batches(1), **options)

    assert report() == report()
    assert (report().batches, report().converged) == (2, True)
    assert (report(tau=1.1).batches, report(tau=1.1).converged) == (20, False)
    assert (report(tau=1.1, max_batches=5).batches) == 5


def test_more_rows_than_directions_stay_random_and_orthogonal_with_a_warning():
    model = get_peft_model(base(), lily_config("linear", r=6, stride_A=3, own_r=3, init_weights="data"))
    one = [{"input_ids": torch.tensor([[0, 1]])}]  # two tokens through three layers: six directions at most
    with pytest.warns(UserWarning, match=r"fewer directions than A has rows.*of own_r=3") as caught:
        initialize_from_data(model, one)
    assert caught[0].filename == __file__
    adapted = find(model)
    A = adapted.bank.lily_A["default"][0].detach()
    assert torch.allclose(A @ A.T, A[0].square().sum() * torch.eye(6), atol=1e-5)
    for layer in adapted.layers.values():
        own = layer.lily_own_A["default"].weight.detach()
        assert torch.allclose(own.norm(dim=1), A[0].norm().expand(3), rtol=1e-4)


def test_a_rank_above_the_number_of_inputs():
    model = get_peft_model(base(), lily_config("linear", r=11, init_weights="data"))
    with pytest.warns(UserWarning, match=r"\(8 of 11\)"):
        initialize_from_data(model, batches())
    pooled = torch.cat([X for name, X in by_hand("linear", batches()).items() if not name.startswith("blocks.2")])
    A = model.base_model.model.lily_bank.lily_A["default"][0].detach()
    assert torch.allclose((pooled @ A.T).square().mean(), pooled.square().sum(1).mean() / 24, rtol=1e-2)


@pytest.mark.parametrize("kind", ["embedding", "parameter", "experts"])
def test_inputs_that_cannot_be_seen_are_refused_or_named(kind):
    model = get_peft_model(base(), lily_config(kind, init_weights="data"))
    with pytest.raises(LilyError, match="embeddings and parameters only"):
        initialize_from_data(model, batches())
    options = {key: value for key, value in KINDS[kind][0].items() if key != "target_modules"}
    names = ["linear", *KINDS[kind][0]["target_modules"]]
    model = get_peft_model(base(), lily_config(kind, init_weights="data", target_modules=names, **options))
    first = {i: A.detach().clone() for i, A in enumerate(model.base_model.model.lily_bank.lily_A["default"])}
    with pytest.warns(UserWarning, match="layers keep the default start.*: (embed|blocks.0.own)"):
        initialize_from_data(model, batches())
    adapted = find(model)
    for number, (group, _) in enumerate(adapted.plan.blocks):
        same = torch.equal(adapted.bank.lily_A["default"][number], first[number])
        assert same == (group.kind != "linear")


def test_what_cannot_work_is_refused():
    def model_of(**options):
        return get_peft_model(base(), lily_config("linear", **{"init_weights": "data", **options}))

    with pytest.raises(LilyError, match="init_weights=True; the start from data is for init_weights='data'"):
        initialize_from_data(model_of(init_weights=True), batches())
    with pytest.raises(LilyError, match="there is no batch"):
        initialize_from_data(model_of(), [])
    trained_one = model_of()
    find(trained_one).bank.lily_B["default"][0].data[0, 0] = 1.0
    with pytest.raises(LilyError, match="trained already"):
        initialize_from_data(trained_one, batches())
    broken = model_of()
    broken.base_model.model.embed.weight.data[2] = float("nan")
    with pytest.raises(LilyError, match=r"input of blocks.0.linear is not finite"):
        initialize_from_data(broken, [{"input_ids": torch.tensor([[2, 3]])}])
    assert not hooks(broken)["base_model.model.blocks.0.linear"][0]
    with pytest.raises(LilyError, match="no Lily adapter"):
        initialize_from_data(base(), batches())


def test_a_second_adapter_is_started_on_the_base_model_whatever_the_first_does():
    model = get_peft_model(base(), lily_config("linear", init_weights="data"))
    initialize_from_data(model, batches())
    alone = find(model).bank.lily_A["default"][0].detach().clone()
    other = get_peft_model(base(), lily_config("linear", init_weights=False))  # changes the model
    other.add_adapter("second", lily_config("linear", init_weights="data"))
    active = other.active_adapters
    initialize_from_data(other, batches(), adapter="second")
    assert other.active_adapters == active
    assert torch.allclose(find(other).bank.lily_A["second"][0], alone, atol=1e-5)


# -- training without it


def train_step(model, batch=None):
    model.train()
    model(**(batch or batches(1)[0])).sum().backward()


def test_training_without_the_call_warns_once_and_after_it_never():
    model = get_peft_model(base(), lily_config("linear", init_weights="data"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        output(model)  # evaluation
        twin = copy.deepcopy(model)
    for one in (model, twin):
        with pytest.warns(UserWarning, match=r"lily.initialize_from_data\(model, dataloader\) before training"):
            train_step(one)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            train_step(one)
        assert not any(waits(h) for m in one.modules() for h in m._forward_pre_hooks.values())
    started = get_peft_model(base(), lily_config("linear", init_weights="data"))
    initialize_from_data(started, batches())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train_step(started)


def test_saving_without_the_call_warns_and_a_loaded_adapter_never_does(tmp_path):
    model = get_peft_model(base(), lily_config("linear", init_weights="data"))
    with pytest.warns(UserWarning, match="has init_weights='data', but no data were given"):
        model.save_pretrained(tmp_path)
    assert LilyConfig.from_pretrained(tmp_path).init_weights == "data"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
        train_step(loaded)
        loaded.save_pretrained(tmp_path / "again")


def test_values_loaded_by_a_state_dict_do_not_warn():
    model = get_peft_model(base(), lily_config("linear", init_weights="data"))
    values = get_peft_model(base(1), lily_config("linear", init_weights=False)).state_dict()
    model.load_state_dict(values)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train_step(model)
    with pytest.raises(LilyError, match="trained already"):
        initialize_from_data(model, batches())


def test_a_deleted_or_unloaded_adapter_does_not_warn():
    model = get_peft_model(base(), lily_config("linear", init_weights="data"))
    model.add_adapter("second", lily_config("linear"))
    model.set_adapter("second")
    model.delete_adapter("default")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train_step(model)
    plain = get_peft_model(base(), lily_config("linear", init_weights="data")).unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train_step(plain.requires_grad_(True))
    torch.save(get_peft_model(base(), lily_config("linear", init_weights="data")), io.BytesIO())


def test_layers_that_a_mixer_calls_for_an_adapter_alone_are_seen_and_one_whose_weight_it_reads_is_named():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=2))
    model = get_peft_model(
        mamba, LilyConfig(r=2, target_modules=["x_proj", "out_proj", "dt_proj"], init_weights="data")
    )
    with pytest.warns(UserWarning, match="2 layers keep the default start.*layers.0.mixer.dt_proj"):
        report = initialize_from_data(model, [{"input_ids": torch.arange(20).view(2, 10)}])
    assert set(report.explained) == {name for name in find(model).layers if not name.endswith("dt_proj")}


def test_the_public_names():
    assert lily.initialize_from_data is initialize_from_data
    assert lily.DataStart.__name__ == "DataStart"


@pytest.mark.slow
def test_several_processes_combine_their_inputs_and_end_with_the_same_A():
    got = processes(_start_of_a_process)
    model = get_peft_model(base(), lily_config("linear", init_weights="data", own_r=1))
    initialize_from_data(model, batches(2), tau=1.1)
    assert got[0] == got[1]
    A = find(model).bank.lily_A["default"][0].detach()
    assert torch.allclose(span(torch.tensor(got[0])), span(A), atol=1e-3)


def _start_of_a_process(rank):
    model = get_peft_model(base(), lily_config("linear", init_weights="data", own_r=1))
    initialize_from_data(model, batches(2)[rank : rank + 1], tau=1.1)
    return find(model).bank.lily_A["default"][0].tolist()
