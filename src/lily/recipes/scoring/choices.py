"""Multiple choice by log-likelihood: of the texts that a row offers, which does the model find likeliest?

As lm-evaluation-harness scores `multiple_choice`: the log-probability of each choice's tokens after the prompt, summed
(`accuracy`, its `acc`) or divided by the choice's length in bytes (`accuracy_norm`, its `acc_bytes`, and its `acc_norm`
but for texts beyond ASCII). Nothing is generated, so a model that was never taught the format has a fair figure too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lily.errors import LilyError
from lily.recipes.data.tables import Row
from lily.recipes.data.tasks import asked
from lily.recipes.scoring.inference import by_length, device_of, inference
from lily.recipes.spec.places import located
from lily.recipes.spec.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """Of which tokens the probability is asked, after which others.

    Attributes:
        row: number of the row.
        choice: number of the choice in it.
        ids: token ids of prompt and choice.
        start: where the choice begins; 1 or more.
    """

    row: int
    choice: int
    ids: Ids
    start: int


def right(
    model: torch.nn.Module, rows: Sequence[Row], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[bool]]:
    """Of each row, whether its likeliest choice is its completion; of equally likely ones the first counts.

    Args:
        model: a causal model.
        rows: canonical sft rows with choices.
        recipe: how prompts are built; batch size and precision.
        tokenizer: the model's.

    Returns:
        `accuracy`, by summed log-probability, and `accuracy_norm`, by that per byte of the choice.
    """
    out: dict[str, list[bool]] = {"accuracy": [], "accuracy_norm": []}
    for row, found in zip(rows, log_likelihoods(model, rows, recipe, tokenizer), strict=True):
        correct = row["choices"].index(row["completion"])
        sizes = np.array([len(choice.encode()) for choice in row["choices"]])
        out["accuracy"].append(bool(np.argmax(found) == correct))
        out["accuracy_norm"].append(bool(np.argmax(found / sizes) == correct))
    return out


def log_likelihoods(
    model: torch.nn.Module, rows: Sequence[Row], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> list[np.ndarray[Any, Any]]:
    """For each row the log-probabilities (choices,) of its choices after its prompt, summed over tokens, in float64.

    Choices that differ in their last token only are read off one pass of the model. Batches hold inputs of like length,
    padded on the right where a causal model does not look, so they change nothing (unless the routing is `batch`).
    """
    shared = by_input([one for i, row in enumerate(rows) for one in asked_of(i, row, recipe, tokenizer)])
    inputs = [{"input_ids": list(ids)} for ids in shared]
    out = [np.zeros(len(row["choices"])) for row in rows]
    device = device_of(model)
    with inference(model, recipe):
        for batch in by_length(inputs, recipe.train.eval_batch_size):
            padded = tokenizer.pad([inputs[i] for i in batch], return_tensors="pt", padding_side="right")
            logits = model(**padded.to(device)).logits
            for i, of_one in zip(batch, logits, strict=True):
                for one in shared[tuple(inputs[i]["input_ids"])]:
                    targets = torch.tensor(one.ids[one.start :], device=device)
                    found = of_one[one.start - 1 : len(one.ids) - 1].float().log_softmax(-1)
                    out[one.row][one.choice] = found.gather(-1, targets[:, None]).double().sum().item()
    return out


def by_input(asked: Sequence[Asked]) -> Mapping[Ids, list[Asked]]:
    """What is asked, by what the model has to read for it: all tokens but the last."""
    shared: dict[Ids, list[Asked]] = {}
    for one in asked:
        shared.setdefault(one.ids[:-1], []).append(one)
    return shared


def asked_of(number: int, row: Row, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Asked]:
    """What is asked about a row's choices.

    White space before a choice is scored with it, as in the harness, since tokens of many vocabularies begin with a
    space; so is a token across the border. No end token is. What is longer than `data.max_length` is cut on the left.

    Raises:
        LilyError: if a choice alone does not fit.
    """
    turn = asked(row["prompt"], recipe, tokenizer)
    chat = not isinstance(turn, str)
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) if chat else turn
    before = _ids(prompt.rstrip(), tokenizer, chat)
    out = []
    for i, choice in enumerate(row["choices"]):
        ids = _ids(prompt + choice, tokenizer, chat)
        start = next((k for k, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        if start == 0:  # the first token has a probability only after another
            first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            ids, start = [first, *ids], 1
        cut = max(0, len(ids) - recipe.data.max_length)
        if cut >= start:
            with located(recipe, "data", "max_length"):
                raise LilyError(
                    f"data.max_length={recipe.data.max_length}: the choice {choice[:60]!r} alone has "
                    f"{len(ids) - start} tokens; raise it"
                )
        out.append(Asked(number, i, tuple(ids[cut:]), start - cut))
    return out


def check(rows: Sequence[Row], recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse choices that cannot be scored, before a weight is read.

    Raises:
        LilyError: names the first.
    """
    for row in rows:
        asked_of(0, row, recipe, tokenizer)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    """Token ids, as in training: with the tokenizer's own special tokens, or with those of the chat template."""
    ids = list(tokenizer(text, add_special_tokens=not chat)["input_ids"])
    ended = not chat and bool(ids) and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return ids[:-1] if ended else ids
