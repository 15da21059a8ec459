"""Rows of fine-tuning on texts: prompts, completions, choices, and what stands beside a conversation."""

from __future__ import annotations

import json
import warnings
from typing import Any

from lily.errors import LilyError
from lily.recipes.data import chats
from lily.recipes.data.cells import get, short, text_in
from lily.recipes.data.chat_template import Chat
from lily.recipes.data.tables import Row
from lily.recipes.spec.data import Choices, Columns
from lily.recipes.spec.schema import Recipe


def prompt_of(row: Row, columns: Columns, where: str) -> Any:
    """The prompt of an sft row: a text, or the messages before the last answer (which may be absent)."""
    column, role = (columns.prompt, "prompt") if columns.messages is None else (columns.messages, "messages")
    value = get(row, str(column), role, where)
    if role == "prompt" and not chats.is_chat(value):
        text = text_prompt(row, columns, where)
        if not needs_chat(value, columns):
            return text
        value = [{"role": "user", "content": text}]
    return Chat.of(chats.prompt(value, str(column), where, **beside(row, columns, where)))


def text_prompt(row: Row, columns: Columns, where: str) -> str:
    """The text of a prompt, with Alpaca's `input` if the recipe names it."""
    column = str(columns.prompt)
    prompt = text_in(get(row, column, "prompt", where), column, where)
    if columns.input is None:
        for name in ("input", "context") if column == "instruction" else ():
            if isinstance(row.get(name), str) and row[name].strip():
                warnings.warn(
                    f"rows have a text in {name!r} beside 'instruction', which is left out; data.columns.input: {name} "
                    "appends it to the prompt",
                    stacklevel=2,
                )
        return prompt
    more = get(row, columns.input, "input", where)
    if more is None or (isinstance(more, str) and not more.strip()):
        return prompt
    return f"{prompt}\n{text_in(more, columns.input, where)}"


def beside(row: Row, columns: Columns, where: str) -> dict[str, Any]:
    """The tools and the system text of a conversation; columns with these names are read also if none is given."""
    return {
        name: row.get(name) if getattr(columns, name) is None else get(row, getattr(columns, name), name, where)
        for name in ("tools", "system")
    } | ({"tools": row["functions"]} if columns.tools is None and "tools" not in row and "functions" in row else {})


def needs_chat(prompt: Any, columns: Columns) -> bool:
    """Whether a prompt can only be written by a chat template."""
    return chats.is_chat(prompt) or columns.tools is not None or columns.system is not None


def check_chat(recipe: Recipe, where: str) -> None:
    """Refuse what excludes the chat template, where a row needs it."""
    for key, wrong in (
        ("data.chat: false", not recipe.data.chat),
        ("data.template", recipe.data.template is not None),
        ("data.choices", recipe.data.choices is not None),
        ("train.packing", recipe.train.packing),
    ):
        if wrong:
            raise LilyError(
                f"{where}: messages, tools and a system text need the chat template, which {key} excludes; remove it"
            )


def completion_of(row: Row) -> str:
    """The (last) completion of a canonical sft row, without white space at its ends; tool calls as JSON."""
    if "messages" not in row:
        return str(row["completion"]).strip()
    answer = chats.answer(row["messages"])
    return answer["content"].strip() or json.dumps([call["function"] for call in answer.get("tool_calls", ())])


def choices_of(row: Row, texts: Row, section: Choices, where: str) -> list[str]:
    """The completions to choose from in a row."""
    if section.column is not None:
        options = get(row, section.column, "column", where, "data.choices.")
        if not isinstance(options, list) or not all(isinstance(choice, str) and choice.strip() for choice in options):
            raise LilyError(f"{where}: column {section.column!r} holds {short(options)}, expected a list of texts")
    else:
        _, mark, rest = texts["prompt"].rpartition(str(section.after))
        if not mark:
            raise LilyError(
                f"{where}: the prompt has no {section.after!r} (data.choices.after): {short(texts['prompt'])}"
            )
        line = (rest.splitlines() or [""])[0]
        options = [choice.strip() for choice in line.split(section.separator) if choice.strip()]
    choices = [section.completion.replace("{choice}", choice) for choice in options]
    if len(choices) < 2:
        raise LilyError(f"{where}: data.choices finds {len(choices)}, expected two or more")
    if texts["completion"] not in choices:
        raise LilyError(
            f"{where}: the completion {short(texts['completion'])} is not one of the choices "
            f"({', '.join(map(short, choices))})"
        )
    return choices
