"""From rows to model inputs by task, for training, evaluation and the preview of `lily plan`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from lily.errors import LilyError
from lily.recipes.data.chat_template import Chat, answer_ids, ids_of, text_of
from lily.recipes.data.chats import is_trained
from lily.recipes.data.images import Preprocess
from lily.recipes.data.rows import Splits
from lily.recipes.data.tables import Row
from lily.recipes.spec.locations import located
from lily.recipes.spec.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # PyTorch's label of tokens that the loss skips
MARKS = 8  # an answer of more tokens is never special tokens and white space alone

Example = dict[str, Any]

# Prepares a model's inputs: a tokenizer, or the preprocessing of images.
Processor = Union["PreTrainedTokenizerBase", Preprocess]


def num_labels(recipe: Recipe, splits: Splits) -> int:
    """Outputs of the task's head; 1 without classes."""
    return len(splits.labels) if splits.labels is not None else 1


@dataclass(frozen=True)
class Encoded:
    """Rows as a model's inputs.

    Attributes:
        examples: with input_ids (and other inputs of the model) or the image, and labels: a class id, a number, or
            token ids with `IGNORED` for tokens without a loss.
        rows: for each example the index of its row; a row of several turns has several examples.
        left_out: for each example of sft that has no loss within `data.max_length`, the index of its row.
        fits: the `data.max_length` that would leave none out; 0 where none is.
        empty: indices of rows with an answer of nothing but special tokens.
    """

    examples: list[Example]
    rows: list[int]
    left_out: list[int] = field(default_factory=list)
    fits: int = 0
    empty: list[int] = field(default_factory=list)


def encode(
    rows: Iterable[Row],
    recipe: Recipe,
    processor: Processor,
    labels: Sequence[str] | None,
    name: str = "the rows",
) -> list[Example]:
    """`Encoded.examples` of rows."""
    return encode_rows(rows, recipe, processor, labels, name).examples


def encode_rows(
    rows: Iterable[Row],
    recipe: Recipe,
    processor: Processor,
    labels: Sequence[str] | None,
    name: str = "the rows",
) -> Encoded:
    """Encode rows for training or evaluation.

    Args:
        rows: canonical rows of the recipe's task.
        recipe: task, maximum length and chat template.
        processor: of the model.
        labels: the classes in the order of their ids, for classification.
        name: of the rows, in messages.

    Raises:
        LilyError: if no example of sft fits.
    """
    if recipe.task == "sft":
        return _encode_turns(rows, recipe, text_processor(processor), name)
    ids = {name: i for i, name in enumerate(labels or ())}
    examples = [
        {**encode_inputs(row, recipe, processor), "labels": ids[row["label"]] if labels is not None else row["label"]}
        for row in rows
    ]
    return Encoded(examples, list(range(len(examples))))


def _encode_turns(rows: Iterable[Row], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, name: str) -> Encoded:
    found = Encoded([], [])
    longest = 0
    for i, row in enumerate(rows):
        for prompt, completion in conversation(row, recipe, tokenizer):
            example = encode_turn(prompt, completion, recipe, tokenizer)
            trained = trained_ids(example)
            if not trained:
                found.left_out.append(i)
                longest = max(longest, len(prompt_ids(prompt, tokenizer)) + 1)
                continue
            if len(trained) <= MARKS and not tokenizer.decode(trained, skip_special_tokens=True).strip():
                found.empty.append(i)
            found.examples.append(example)
            found.rows.append(i)
    if found.left_out and not found.examples:
        with located(recipe, "data", "max_length"):
            raise LilyError(
                f"no example fits data.max_length={recipe.data.max_length}: every prompt of {name} fills it; "
                f"raise it to {longest} or more"
            )
    return replace(found, fits=longest)


def trained_ids(example: Example) -> list[int]:
    """The tokens of an example of sft that have a loss."""
    return [label for label in example["labels"] if label != IGNORED]


def encode_inputs(row: Row, recipe: Recipe, processor: Processor) -> Example:
    """Token ids of a text or a pair, truncated to `data.max_length`; of an image its path, read with its batch."""
    if isinstance(processor, Preprocess):
        return {"image": row["image"]}
    return dict(processor(row["text"], row.get("text_pair"), truncation=True, max_length=recipe.data.max_length))


def collate(examples: Sequence[Example], processor: Processor, side: str | None = None) -> dict[str, Tensor]:
    """Model inputs of encoded rows, padded to the longest; `side` of the padding: by default the tokenizer's."""
    if isinstance(processor, Preprocess):
        return processor.batch(examples)
    return dict(processor.pad(list(examples), return_tensors="pt", padding_side=side))


def text_processor(processor: Processor) -> PreTrainedTokenizerBase:
    """The processor as a tokenizer, for tasks of texts."""
    assert not isinstance(processor, Preprocess)
    return processor


def length(example: Example) -> int:
    """Tokens of an encoded row; images are all of one size."""
    return len(example.get("input_ids", ()))


def conversation(row: Row, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str | Chat, Any]]:
    """The (prompt, completion) pairs of an sft row: texts, or chats and messages for the tokenizer's chat template.

    A conversation of several turns gives one pair per assistant turn, so every answer has a loss, also if
    the template cannot mark answers.
    """
    if "messages" in row:
        if not tokenizer.chat_template:
            with located(recipe, "data", "columns", "messages"):
                raise LilyError("data.columns.messages needs a tokenizer with a chat template; this model's has none")
        chat = Chat.of(row)
        turns = [i for i, message in enumerate(chat.messages) if is_trained(message)]
        return [(replace(chat, messages=chat.messages[:i]), [chat.messages[i]]) for i in turns]
    prompt, completion = format_prompt(row["prompt"], recipe, tokenizer), row["completion"]
    if isinstance(prompt, str):
        return [(prompt, completion + (tokenizer.eos_token or ""))]
    return [(prompt, [{"role": "assistant", "content": completion}])]


def format_prompt(prompt: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str | Chat:
    """A prompt in the recipe's template, or as a message for the tokenizer's chat template."""
    if recipe.data.template is not None:
        return recipe.data.template.replace("{prompt}", prompt)
    chat = recipe.data.chat and tokenizer.chat_template
    return Chat([{"role": "user", "content": prompt}]) if chat else prompt


def prompt_ids(prompt: str | Chat, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt, ready for the model to answer."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return ids_of(text_of(prompt, tokenizer, answering=True), tokenizer)


def encode_turn(prompt: str | Chat, completion: Any, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Token ids of prompt and completion with the loss on the completion, truncated to `data.max_length`."""
    if isinstance(prompt, str):
        before, whole = prompt_ids(prompt, tokenizer), list(tokenizer(prompt + completion)["input_ids"])
        start = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    else:
        with located(recipe, "data", "columns"):
            whole, start = answer_ids(replace(prompt, messages=[*prompt.messages, *completion]), tokenizer)
    labels = [IGNORED] * start + whole[start:]
    return {"input_ids": whole[: recipe.data.max_length], "labels": labels[: recipe.data.max_length]}


def preview(recipe: Recipe, processor: Processor, row: Row) -> tuple[tuple[str, bool], ...]:
    """One example, decoded, as (text, whether it has a loss): the completion for sft, else the label."""
    if isinstance(processor, Preprocess):
        name = Path(row["image"]).name if isinstance(row["image"], str) else "an image"
        return (f"{name}, {processor.size} x {processor.size}", False), (f" -> {row['label']}", True)
    tokenizer = processor
    if recipe.task != "sft":
        ids = encode_inputs(row, recipe, tokenizer)["input_ids"]
        return (tokenizer.decode(ids), False), (f" -> {row['label']}", True)
    segments: list[tuple[list[int], bool]] = []
    turns = [encode_turn(*turn, recipe, tokenizer) for turn in conversation(row, recipe, tokenizer)]
    for example in [turn for turn in turns if trained_ids(turn)][-1:] or turns[-1:]:
        for token, label in zip(example["input_ids"], example["labels"], strict=True):
            trained = label != IGNORED
            if not segments or segments[-1][1] != trained:
                segments.append(([], trained))
            segments[-1][0].append(token)
    return tuple((tokenizer.decode(ids), trained) for ids, trained in segments)
