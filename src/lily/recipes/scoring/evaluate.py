"""Evaluate a model: metrics on rows, predictions, generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lily.layers.sharding import root_gathered
from lily.progress.progress import counted
from lily.recipes import data
from lily.recipes.data.chat_template import Chat
from lily.recipes.data.chats import content_of
from lily.recipes.data.tables import Row
from lily.recipes.data.tasks import (
    IGNORED,
    Example,
    Processor,
    collate,
    conversation,
    encode,
    encode_inputs,
    prompt_ids,
    text_processor,
)
from lily.recipes.scoring import choices
from lily.recipes.scoring import metrics as metric_tools
from lily.recipes.scoring import review as reviews
from lily.recipes.scoring.answer_lengths import Answer, AnswerLengths, expected_tokens, lengths_of
from lily.recipes.scoring.answers import answer_in, expected_answers
from lily.recipes.scoring.inference import by_length, device_of, inference, to_device
from lily.recipes.spec.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Judge:
    """Computes a recipe's metrics of a model on rows.

    Attributes:
        items: results of the last call per row: `expected` and `predicted` (class indices or numbers), whether it is
            right (0 or 1) by name of the metric, and `loss`; for sft per example, summed over its `tokens`.
        review: what was wrong in the last call.
    """

    def __init__(self, recipe: Recipe, processor: Processor, labels: Sequence[str] | None) -> None:
        self.recipe, self.processor, self.labels = recipe, processor, labels
        self.names = metric_tools.metrics_of(recipe)
        self.items: dict[str, list[Any]] = {}
        self.review = reviews.Review()

    def __call__(self, model: torch.nn.Module, rows: Sequence[Row]) -> dict[str, float]:
        """Metric -> value. Predictions do not depend on how rows are batched (unless the routing is `batch`)."""
        recipe = self.recipe
        if recipe.task == "sft":
            tokenizer = text_processor(self.processor)
            losses, tokens = token_losses(model, encode(rows, recipe, tokenizer, None), recipe, tokenizer)
            loss, right = mean_loss(losses, tokens), self.right(model, rows)
            self.items = {"loss": _short(losses), "tokens": tokens}
            self.items |= {name: [int(r) for r in of_rows] for name, of_rows in right.items()}
            values = {"loss": loss, "perplexity": float(np.exp(min(loss, 80.0))), **_shares(right)}
            return {name: values[name] for name in self.names}
        outputs = head_outputs(model, rows, recipe, self.processor)
        if self.labels is not None:
            ids = {name: i for i, name in enumerate(self.labels)}
            expected = np.array([ids[row["label"]] for row in rows])
            predicted = outputs.argmax(-1)
            shifted = outputs - outputs.max(-1, keepdims=True)
            losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(rows)), expected]
            self.items = {"accuracy": (predicted == expected).astype(int).tolist()}
            self.review = reviews.of_classes(outputs, expected, self.labels, rows)
        else:
            expected, predicted = np.array([row["label"] for row in rows]), outputs.reshape(-1)
            losses = (predicted - expected) ** 2
            self.items = {}
            self.review = reviews.of_numbers(predicted, expected, rows)
        loss = float(np.mean(losses))
        self.items |= {"expected": _short(expected), "predicted": _short(predicted), "loss": _short(losses)}
        values = metric_tools.compute(self.names, predicted, expected)
        return {name: values.get(name, loss) for name in self.names}

    def beyond_loss(self, model: torch.nn.Module, rows: Sequence[Row]) -> dict[str, float]:
        """The recipe's sft metrics besides the loss: of generated answers, and of choices."""
        return _shares(self.right(model, rows))

    def right(self, model: torch.nn.Module, rows: Sequence[Row]) -> dict[str, list[bool]]:
        """Whether each row is right, by each of these metrics."""
        out: dict[str, list[bool]] = {}
        tokenizer = text_processor(self.processor)
        if "exact_match" in self.names:
            generated = answers(model, tokenizer, prompts_of(rows, self.recipe, tokenizer), self.recipe)
            out["exact_match"] = exact_matches(generated, rows, self.recipe)
            lengths = lengths_of(generated, expected_tokens(rows, tokenizer), self.recipe)
            self.review = reviews.Review(answers=lengths)
        if self.recipe.data.choices is not None and {"accuracy", "accuracy_norm"} & set(self.names):
            out |= choices.right(model, rows, self.recipe, tokenizer)
        return out


def head_outputs(
    model: torch.nn.Module,
    rows: Sequence[Row],
    recipe: Recipe,
    processor: Processor,
    outputs: Callable[[Any, dict[str, Any]], Any] = lambda model, inputs: model(**inputs).logits,
) -> np.ndarray[Any, Any]:
    """The head's outputs (rows, outputs) in float32, in the rows' order; batched by length to reduce padding.

    `outputs` may compute something else (batch, features) from the model and its inputs.
    """
    encoded = [encode_inputs(row, recipe, processor) for row in rows]
    out: list[Any] = [None] * len(rows)
    with inference(model, recipe):
        for batch in counted(by_length(encoded, recipe.train.eval_batch_size), "judge"):
            inputs = to_device(collate([encoded[i] for i in batch], processor), device_of(model))
            for i, row in zip(batch, outputs(model, inputs).float().cpu().numpy(), strict=True):
                out[i] = row
    return np.stack(out)


def _short(values: Any) -> list[Any]:
    """As numbers with six digits, which suffice for comparisons and halve the file."""
    return [value if isinstance(value, int) else float(f"{value:.6g}") for value in np.asarray(values).tolist()]


def _shares(right: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    return {name: float(np.mean(of_rows)) for name, of_rows in right.items()}


def token_loss(
    model: torch.nn.Module, examples: Sequence[Example], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> float:
    """Mean cross-entropy over all tokens with a label."""
    return mean_loss(*token_losses(model, examples, recipe, tokenizer))


def mean_loss(losses: Sequence[float], tokens: Sequence[int]) -> float:
    """The mean over all tokens of the result of `token_losses`."""
    return float(np.sum(losses) / max(np.sum(tokens), 1))


def token_losses(
    model: torch.nn.Module, examples: Sequence[Example], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[float], list[int]]:
    """Per example: cross-entropy summed over the tokens with a label, and the number of these tokens."""
    totals, counts = [0.0] * len(examples), [0] * len(examples)
    with inference(model, recipe):
        for batch in counted(by_length(examples, recipe.train.eval_batch_size), "judge"):
            chosen = [examples[i] for i in batch]
            padded = tokenizer.pad(
                {"input_ids": [e["input_ids"] for e in chosen]}, return_tensors="pt", padding_side="right"
            )
            width = padded["input_ids"].shape[1]
            labels = torch.tensor([e["labels"] + [IGNORED] * (width - len(e["labels"])) for e in chosen])
            logits = model(**padded.to(device_of(model))).logits.float()[:, :-1].cpu()
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
            )
            for i, loss, marked in zip(batch, losses.sum(1).tolist(), labels[:, 1:] != IGNORED, strict=True):
                totals[i], counts[i] = loss, int(marked.sum())
    return totals, counts


def answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], recipe: Recipe, streamer: Any = None
) -> list[Answer]:
    """Greedy answers to prompts (texts or message lists), batched with left padding, in the prompts' order.

    A `streamer` receives the answer to a single prompt token by token.
    """
    encoded = [{"input_ids": prompt_ids(p, tokenizer)} for p in prompts]
    out = [Answer("", 0, False)] * len(prompts)
    ends = _end_tokens(model, tokenizer)
    with inference(model, recipe):
        for batch in counted(by_length(encoded, recipe.train.eval_batch_size), "generate"):
            ids = {"input_ids": [encoded[i]["input_ids"] for i in batch]}
            padded = tokenizer.pad(ids, return_tensors="pt", padding_side="left").to(device_of(model))
            with root_gathered(model):
                generated = model.generate(
                    **padded,
                    max_new_tokens=recipe.generation.max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                    streamer=streamer,
                )
            new = generated[:, padded["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            for i, text, tokens in zip(batch, texts, new.tolist(), strict=True):
                length = next((at for at, token in enumerate(tokens) if token in ends), None)
                cut = length is None and len(tokens) >= recipe.generation.max_new_tokens
                out[i] = Answer(text.strip(), len(tokens) if length is None else length, cut)
    return out


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens at which the model stops."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return set(ends) if isinstance(ends, (list, tuple)) else {int(ends)} if ends is not None else set()


def prompts_of(rows: Sequence[Row], recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The prompts of the rows' last answers, as texts or chats."""
    return [conversation(row, recipe, tokenizer)[-1][0] for row in rows]


def exact_matches(generated: Sequence[Answer], rows: Sequence[Row], recipe: Recipe) -> list[bool]:
    """For each row, whether its answer equals the completion's, both extracted by `generation.answer`."""
    found = [answer_in(answer.text, recipe) for answer in generated]
    return [answer == expected for answer, expected in zip(found, expected_answers(rows, recipe), strict=True)]


def samples(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    recipe: Recipe,
    when: str,
    earlier: Sequence[dict[str, Any]] | None = None,
) -> tuple[list[dict[str, Any]], AnswerLengths | None]:
    """The first held-out prompts with the model's answers under the key `when`, merged into `earlier`; their lengths.

    `cut` lists the keys of the answers that `generation.max_new_tokens` ended; it is absent if none was.
    """
    if recipe.task != "sft" or recipe.generation.samples == 0:
        return [], None
    rows = rows[: recipe.generation.samples]
    prompts = prompts_of(rows, recipe, tokenizer)
    generated = answers(model, tokenizer, prompts, recipe)
    out = []
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        entry = earlier[i] if earlier else {"prompt": _in_full(prompt), "expected": data.completion_of(row)}
        cut = {"cut": [*entry.get("cut", ()), when]} if generated[i].cut else {}
        out.append({**entry, when: generated[i].text, **cut})
    return out, lengths_of(generated, expected_tokens(rows, tokenizer), recipe)


def _in_full(prompt: str | Chat) -> str:
    """A prompt for people: of several messages each with its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt.messages) == 1:
        return str(prompt.messages[0]["content"])
    return "\n".join(f"{message['role']}: {content_of(message)}" for message in prompt.messages)
