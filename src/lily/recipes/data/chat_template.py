"""Messages -> text and tokens, by the chat template of a tokenizer, which must not lose any of them.

A template is a program that another person wrote. It may refuse a message, or leave one out silently; either is an
error that names the message and the key.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lily.errors import LilyError
from lily.recipes.data.chats import REASONING, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\ue000"  # a character that no text has

# Shapes of chats that the template of a tokenizer expresses.
_expressed: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Chat:
    """Messages with the tools that the assistant may call.

    Attributes:
        where: file and row, for messages.
    """

    messages: Sequence[Message]
    tools: list[dict[str, Any]] | None = None
    where: str = "the prompt"

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Chat:
        """The chat of a row that `chats` read."""
        return cls(row["messages"], row.get("tools"), row.get("where", cls.where))


def text_of(chat: Chat, tokenizer: PreTrainedTokenizerBase, answering: bool = False) -> str:
    """The text of a chat; `answering`: up to where the assistant begins to answer.

    Raises:
        LilyError: names the message and the key that the template refuses or leaves out.
    """
    if not tokenizer.chat_template:
        raise LilyError(f"{chat.where}: messages need a tokenizer with a chat template; this model's has none")
    try:
        text = _rendered(chat, tokenizer, answering)
    except _refusals() as error:
        raise _refused(chat, tokenizer, answering, str(error)) from None
    _check_expressed(chat, tokenizer, answering, text)
    return text


def ids_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a chat's text, which has its special tokens already."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_ids(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """The tokens of a chat, and the index of the first one of its last message, after the assistant's header."""
    text = text_of(chat, tokenizer)
    before, whole = (ids_of(part, tokenizer) for part in (text[: _answer_start(chat, text, tokenizer)], text))
    # a token across the border belongs to the answer
    start = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    return whole, start


def _answer_start(chat: Chat, text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the last message starts in the text of a chat."""
    earlier = replace(chat, messages=chat.messages[:-1])
    with contextlib.suppress(*_refusals()):
        if text.startswith(before := _rendered(earlier, tokenizer, answering=True)):
            return len(before)
    # Nothing precedes it, or the template writes earlier messages differently if another follows: it starts after the
    # header that is nearest to where the text of another answer differs.
    other = _rendered(
        replace(chat, messages=[*earlier.messages, {"role": "assistant", "content": MARK}]), tokenizer, False
    )
    differs = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), len(other))
    question = Chat([{"role": "user", "content": MARK}])
    asked, header = (_rendered(question, tokenizer, answering) for answering in (False, True))
    header = header.removeprefix(asked)
    found = text.rfind(header, 0, differs) if header else -1
    return differs if found < 0 else found + len(header)


def _rendered(chat: Chat, tokenizer: PreTrainedTokenizerBase, answering: bool) -> str:
    """The template's text. Most templates want the arguments of a call as an object, some as JSON."""
    calls = [call["function"] for m in chat.messages for call in m.get("tool_calls", ())]
    try:
        text = _applied(chat, tokenizer, answering)
    except _refusals() as error:
        if not calls:
            raise
        try:
            return _applied(_with_json_arguments(chat), tokenizer, answering)
        except _refusals():
            raise error from None
    # an object that was written by Python's rules
    for written in (repr(call["arguments"]) for call in calls if call["arguments"]):
        if text.count(written) > sum(message["content"].count(written) for message in chat.messages):
            return _applied(_with_json_arguments(chat), tokenizer, answering)
    return text


def _applied(chat: Chat, tokenizer: PreTrainedTokenizerBase, answering: bool) -> str:
    template = tokenizer.get_chat_template(tools=chat.tools)
    reasoning = next((name for name in REASONING if name in template), REASONING[0])
    names = {"reasoning_content": reasoning}
    messages = [{names.get(k, k): v for k, v in m.items() if k != "weight"} for m in chat.messages]
    return str(
        tokenizer.apply_chat_template(messages, tools=chat.tools, add_generation_prompt=answering, tokenize=False)
    )


def _with_json_arguments(chat: Chat) -> Chat:
    def written(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return replace(
        chat,
        messages=[
            {**m, "tool_calls": [written(c) for c in m["tool_calls"]]} if "tool_calls" in m else m
            for m in chat.messages
        ],
    )


# --- what a template cannot express ---------------------------------------------------------------------------------


def _refusals() -> tuple[type[Exception], ...]:
    """What a template raises on purpose, or when it reads what is not there."""
    from jinja2 import TemplateError

    return (TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError)


def _refused(chat: Chat, tokenizer: PreTrainedTokenizerBase, answering: bool, reason: str) -> LilyError:
    """The error about a chat that the template refuses, with the message and the key without which it would not."""

    def fails(messages: Sequence[Message], tools: Any = chat.tools, answering: bool = False) -> str | None:
        try:
            _rendered(Chat(messages, tools), tokenizer, answering)
        except _refusals() as error:
            return str(error)
        return None

    said = f"the model's chat template refuses it: {reason}"
    if chat.tools and fails(chat.messages, None, answering) is None:
        return LilyError(f"{chat.where}, key 'tools': {said}; {FIXES['tools']}")
    counts = range(1, len(chat.messages) + 1)
    end = next((n for n in counts if fails(chat.messages[:n]) == reason), len(chat.messages))
    number = next((n for n in range(end, 0, -1) if not fails([*chat.messages[: n - 1], *chat.messages[n:end]])), end)
    *before, message = chat.messages[:number]
    optional = [key for key in message if key not in ("role", "content", "weight")]
    healed = (key for key in optional if not fails([*before, {k: v for k, v in message.items() if k != key}]))
    key = next(healed, "role")
    what = f"role {message['role']!r}" if key == "role" else f"key {key!r}"
    fix = FIXES.get(message["role"] if key == "role" else key, FIXES["role"])
    return LilyError(f"{chat.where}, message {number}, {what}: {said}; {fix}")


FIXES = {
    "tools": "use a model whose template knows tools, or remove them",
    "tool_calls": "use a model whose template knows such calls, or remove the row",
    "reasoning_content": "remove the reasoning, or put it into content",
    "content": "move its text into a message that the template keeps, or remove it",
    "developer": "rename the role to system",
    "tool": "use a model whose template knows tools, or remove the row",
    "role": "change or remove the message, or the row",
}


def _check_expressed(chat: Chat, tokenizer: PreTrainedTokenizerBase, answering: bool, text: str) -> None:
    """Check that every part of a chat makes a difference to its text, once for all chats of the same shape.

    Raises:
        LilyError: names the first part that makes none.
    """
    known, shape = _expressed.setdefault(tokenizer, set()), _shape(chat, tokenizer)
    first = next((n for n in range(len(chat.messages), 0, -1) if shape[: n + 1] in known), 0)
    for at, key, said, changed in _changes(chat, first, answering):
        try:
            same = _rendered(changed, tokenizer, answering) == text
        except _refusals():
            continue
        if same:
            raise LilyError(f"{chat.where}{at}: the model's chat template {said}; {FIXES[key]}")
    known.add(shape)


def _changes(chat: Chat, first: int, answering: bool) -> Iterator[tuple[str, str, str, Chat]]:
    """Chats with one change each: where it is, the key of its fix, what it means if the text stays the same.

    The changes are in the messages from index `first`, and in the tools if that is the first message.
    """
    left_out = "leaves it out, so the model would never see it"
    for i in range(0 if first else len(chat.tools or ())):
        others = [tool for k, tool in enumerate(chat.tools or ()) if k != i]
        yield f", key 'tools[{i}]'", "tools", left_out, replace(chat, tools=others or None)
    for i, message in enumerate(chat.messages[first:], first):

        def changed(to: Message, i: int = i) -> Chat:
            return replace(chat, messages=[*chat.messages[:i], to, *chat.messages[i + 1 :]])

        role, at = message["role"], f", message {i + 1}"
        if message["content"].strip():
            to = changed({**message, "content": message["content"] + MARK})
            yield f"{at}, key 'content' of role {role!r}", role if role in FIXES else "content", left_out, to
        for other in ("user", "assistant") if role in ("developer", "tool") else ():
            said = f"writes it as if its role were {other!r}"
            yield f"{at}, role {role!r}", role, said, changed({**message, "role": other})
        for k, call in enumerate(message.get("tool_calls", ())):
            for field, value in (("name", MARK), ("arguments", {MARK: MARK})):
                other_call = {**call, "function": {**call["function"], field: value}}
                calls = [*message["tool_calls"][:k], other_call, *message["tool_calls"][k + 1 :]]
                to = changed({**message, "tool_calls": calls})
                yield f"{at}, key 'tool_calls[{k}].function.{field}'", "tool_calls", left_out, to
        # Templates drop the reasoning of earlier answers on purpose.
        if "reasoning_content" in message and i == len(chat.messages) - 1 and not answering:
            to = changed({**message, "reasoning_content": message["reasoning_content"] + MARK})
            yield f"{at}, key 'reasoning_content' (thinking, reasoning)", "reasoning_content", left_out, to


def _shape(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """What a template's branches depend on: the roles, and which keys are there. An entry for each message follows."""
    return (str(tokenizer.chat_template), len(chat.tools or ())), *(
        (m["role"], bool(m["content"].strip()), "reasoning_content" in m, len(m.get("tool_calls", ())))
        for m in chat.messages
    )
