"""Multiple choice by log-likelihood: does the model assign the highest probability to the right choice?

As `multiple_choice` in lm-evaluation-harness: the log-probability of each choice's tokens after the prompt, summed
(`accuracy`; `acc` there) or divided by the choice's length in bytes (`accuracy_norm`; `acc_bytes` there, and
`acc_norm` for ASCII). Nothing is generated, so the score is meaningful also for a model that does not know the format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lily.errors import LilyError
from lily.progress.progress import counted
from lily.recipes.data.chat_template import text_of
from lily.recipes.data.tables import Row
from lily.recipes.data.tasks import format_prompt
from lily.recipes.scoring.inference import by_length, device_of, inference
from lily.recipes.spec.locations import located
from lily.recipes.spec.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


@dataclass(frozen=True)
class ScoredChoice:
    """A choice whose log-probability after its prompt is computed.

    Attributes:
        row: index of the row.
        choice: index of the choice in the row.
        ids: token ids of prompt and choice.
        start: index of the first token of the choice; at least 1.
    """

    row: int
    choice: int
    ids: Ids
    start: int


def right(
    model: torch.nn.Module, rows: Sequence[Row], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[bool]]:
    """For each row, whether its likeliest choice is its completion; of equally likely ones the first counts.

    Returns:
        `accuracy`, by summed log-probability, and `accuracy_norm`, by log-probability per byte of the choice.
    """
    out: dict[str, list[bool]] = {"accuracy": [], "accuracy_norm": []}
    for row, scores in zip(rows, log_likelihoods(model, rows, recipe, tokenizer), strict=True):
        correct = row["choices"].index(row["completion"])
        sizes = np.array([len(choice.encode()) for choice in row["choices"]])
        out["accuracy"].append(bool(np.argmax(scores) == correct))
        out["accuracy_norm"].append(bool(np.argmax(scores / sizes) == correct))
    return out


def log_likelihoods(
    model: torch.nn.Module, rows: Sequence[Row], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> list[np.ndarray[Any, Any]]:
    """For each row the log-probabilities (choices,) of its choices after its prompt, summed over tokens, in float64.

    Choices that differ only in their last token share a forward pass. Batches have inputs of similar length, padded on
    the right, where a causal model does not attend, so batching changes nothing (unless the routing is `batch`).
    """
    shared = by_input([choice for i, row in enumerate(rows) for choice in scored_choices(i, row, recipe, tokenizer)])
    inputs = [{"input_ids": list(ids)} for ids in shared]
    out = [np.zeros(len(row["choices"])) for row in rows]
    device = device_of(model)
    with inference(model, recipe):
        for batch in counted(by_length(inputs, recipe.train.eval_batch_size), "judge"):
            padded = tokenizer.pad([inputs[i] for i in batch], return_tensors="pt", padding_side="right")
            logits = model(**padded.to(device)).logits
            for i, row_logits in zip(batch, logits, strict=True):
                for one in shared[tuple(inputs[i]["input_ids"])]:
                    targets = torch.tensor(one.ids[one.start :], device=device)
                    logprobs = row_logits[one.start - 1 : len(one.ids) - 1].float().log_softmax(-1)
                    out[one.row][one.choice] = logprobs.gather(-1, targets[:, None]).double().sum().item()
    return out


def by_input(choices: Sequence[ScoredChoice]) -> Mapping[Ids, list[ScoredChoice]]:
    """Choices by the model's input: all tokens but the last."""
    shared: dict[Ids, list[ScoredChoice]] = {}
    for one in choices:
        shared.setdefault(one.ids[:-1], []).append(one)
    return shared


def scored_choices(number: int, row: Row, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[ScoredChoice]:
    """A row's choices, tokenized after its prompt.

    White space before a choice is scored with it, as in the harness, since tokens of many vocabularies begin with a
    space; so is a token across the border. The end token is not. Inputs over `data.max_length` are cut on the left.

    Raises:
        LilyError: if a choice is longer than `data.max_length`.
    """
    turn = format_prompt(row["prompt"], recipe, tokenizer)
    chat = not isinstance(turn, str)
    prompt = turn if isinstance(turn, str) else text_of(turn, tokenizer, answering=True)
    before = _ids(prompt.rstrip(), tokenizer, chat)
    out = []
    for i, choice in enumerate(row["choices"]):
        ids = _ids(prompt + choice, tokenizer, chat)
        start = next((k for k, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        if start == 0:  # a first token has no probability; put another before it
            first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            ids, start = [first, *ids], 1
        cut = max(0, len(ids) - recipe.data.max_length)
        if cut >= start:
            with located(recipe, "data", "max_length"):
                raise LilyError(
                    f"data.max_length={recipe.data.max_length}: the choice {choice[:60]!r} alone has "
                    f"{len(ids) - start} tokens; raise it"
                )
        out.append(ScoredChoice(number, i, tuple(ids[cut:]), start - cut))
    return out


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    """Token ids, as in training: with the tokenizer's special tokens, or those of the chat template."""
    ids = list(tokenizer(text, add_special_tokens=not chat)["input_ids"])
    ended = not chat and bool(ids) and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return ids[:-1] if ended else ids
