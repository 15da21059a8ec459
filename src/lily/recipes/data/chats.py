"""Chats as people keep them -> messages in one shape, which chat templates read.

OpenAI's shape (`role`, `content`, `tool_calls`, `weight`), ShareGPT's (`from`, `value`) and mixtures of both are read.
The result has `role` and `content`, and where they apply `tool_calls`, `reasoning_content`, `name`, `tool_call_id` and
`weight: 0` (not trained). No tokenizer is needed: `lily.recipes.data.chat_template` renders messages.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lily.errors import LilyError
from lily.recipes.spec.values import SURROGATE, is_blank

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
CALLS = ("function_call", "tool_call")  # ShareGPT's roles of an assistant that calls a tool: the value is the call

ROLE, CONTENT = ("role", "from"), ("content", "value")
REASONING = ("reasoning_content", "thinking", "reasoning")
WEIGHTS = ("weight", "train", "training", "loss")  # OpenAI's; axolotl's; ms-swift's
ASSISTANT_ONLY = ("tool_calls", "function_call", *REASONING)
READ = (*ROLE, *CONTENT, *ASSISTANT_ONLY, *WEIGHTS, "name", "tool_call_id")
# Content that a model of texts cannot read, and weights of parts of a message: without them, something else is trained.
UNSUPPORTED = ("image", "images", "audio", "audios", "video", "videos", "refusal", "train_detail", "training_detail")
TEXTS = ("text", "input_text", "output_text")


def conversation(
    value: Any, column: str, where: str, *, row: Mapping[str, Any], tools: Any = None, system: Any = None
) -> dict[str, Any]:
    """A conversation to train on: its messages, its `tools` if there are any, and `where` it stands, for messages.

    Args:
        value: the messages; a JSON text of them too.
        column: that holds them.
        where: file and row.
        row: the whole row, whose images and the like are refused.
        tools: schemas of the tools, or a JSON text of them.
        system: the text of a system message before the others.

    Raises:
        LilyError: for the first problem, with its message and key.
    """
    return _checked(read_messages(value, column, where), column, where, row, tools, system)


def pair(
    prompt: Any,
    completion: Any,
    columns: tuple[str, str],
    where: str,
    *,
    row: Mapping[str, Any],
    tools: Any = None,
    system: Any = None,
) -> dict[str, Any]:
    """`conversation` from a prompt and a completion, either of which may be a text or a list of messages.

    Only the completion's messages are trained.
    """
    before = read_messages(_untrained(_as_messages(prompt, "user")), columns[0], where)
    answers = read_messages(_as_messages(completion, "assistant"), columns[1], where, len(before) + 1)
    return _checked([*before, *answers], columns[1], where, row, tools, system)


def prompt(value: Any, column: str, where: str, *, tools: Any = None, system: Any = None) -> dict[str, Any]:
    """`conversation` up to the last answer, which may be absent."""
    messages, where = _with_system(read_messages(_untrained(value), column, where), system, where)
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not messages:
        raise LilyError(f"{where}: column {column!r} has nothing before the assistant's message; give a user's")
    return {"messages": messages, "tools": read_tools(tools, where), "where": where}


def is_chat(value: Any) -> bool:
    """Whether a value looks like a list of messages."""
    return isinstance(value, list) and any(isinstance(m, dict) and any(key in m for key in ROLE) for m in value)


def is_trained(message: Message) -> bool:
    """Whether the loss counts a message."""
    return bool(message["role"] == "assistant" and message.get("weight", 1) == 1)


def answer(messages: Sequence[Message]) -> Message:
    """The last message that is trained, which is the expected answer."""
    return next(m for m in reversed(messages) if is_trained(m))


def inputs(row: Mapping[str, Any]) -> list[str]:
    """The texts of a conversation before its last message, by which duplicates are detected."""
    texts = [m["content"] for m in row["messages"][:-1]]
    calls = [m["tool_calls"] for m in row["messages"][:-1] if "tool_calls" in m]
    return [*texts, *(json.dumps(more, sort_keys=True) for more in (calls, row.get("tools")) if more)]


# --- messages -------------------------------------------------------------------------------------------------------


def read_messages(value: Any, column: str, where: str, first: int = 1) -> list[Message]:
    """The messages of a list, or of a JSON text of one; `first` is the number of the first.

    Raises:
        LilyError: for the first problem, with its message and key.
    """
    listed = from_json(value) if isinstance(value, str) else value
    if not isinstance(listed, list) or not listed or not all(isinstance(message, dict) for message in listed):
        raise LilyError(
            f"{where}: column {column!r} holds {_kind(value)}, expected a list of messages such as "
            "{role: user, content: text} or {from: human, value: text}"
        )
    for i, message in enumerate(listed, first):
        check_text(message, f"{where}: column {column!r}", f"message {i}, ")
    return [read_message(message, f"{where}, message {i}") for i, message in enumerate(listed, first)]


def read_message(given: Mapping[str, Any], where: str) -> Message:
    """A message in the one shape.

    Raises:
        LilyError: names its key.
    """
    given = {key: value for key, value in given.items() if value is not None}
    _check_keys(given, where)
    said = _either(given, ROLE, where)
    role = said.strip().lower() if isinstance(said, str) else said
    calling = role in CALLS
    role = "assistant" if calling else ALIASES.get(role) if isinstance(role, str) else None
    if role is None:
        raise LilyError(f"{where}: role {said!r} is unknown, expected one of {', '.join(ROLES)}")
    for key in ASSISTANT_ONLY:
        if role != "assistant" and given.get(key):
            raise LilyError(f"{where}: key {key!r} belongs to an assistant's message, not to {said!r}; remove it")
    content, thought = _content(_either(given, CONTENT, where), role, where)
    calls: Any = given.get("tool_calls") or ([given["function_call"]] if "function_call" in given else [])
    if calling:
        found = from_json(content)
        if found is None:
            raise LilyError(f"{where}: the {said} is not JSON, expected {{name, arguments}}: {_kind(content)}")
        calls, content = found if isinstance(found, list) else [found], ""
    message: Message = {"role": role, "content": content or ""}
    if calls:
        message["tool_calls"] = _tool_calls(calls, where)
        check_text(message["tool_calls"], where, "tool_calls")  # JSON texts may have escapes of half a character
    reasoning = {key: given[key] for key in REASONING if key in given} | ({"content": thought} if thought else {})
    for key, text in reasoning.items():
        if not isinstance(text, str) or text != next(iter(reasoning.values())):
            raise LilyError(f"{where}: key {key!r} holds {_kind(text)}, expected one text of the reasoning")
        if text.strip():
            message["reasoning_content"] = text
    message |= {key: given[key] for key in ("name", "tool_call_id") if key in given}
    trained = _weight(given, role, where)
    if role == "assistant" and not trained:
        message["weight"] = 0
    if content is None and not {"tool_calls", "reasoning_content", "weight"} & message.keys():
        raise LilyError(f"{where}: content is missing or null, expected text; the message has {', '.join(given)}")
    if is_trained(message) and not content_of(message):
        raise LilyError(
            f"{where}: content of the assistant is empty, so only its end token would be trained; remove the "
            "conversation, or set weight: 0"
        )
    return message


def content_of(message: Message) -> str:
    """What there is to learn in a message; empty if nothing."""
    calls = json.dumps(message["tool_calls"]) if "tool_calls" in message else ""
    text = f"{message['content']}{message.get('reasoning_content', '')}{calls}"
    return "" if is_blank(text) else text.strip()


def check_text(value: Any, holder: str, place: str = "") -> None:
    """Check that texts, at any depth, are complete Unicode, which tokenizers need.

    Raises:
        LilyError: names the holder, and the place and key of the first half of a surrogate pair.
    """
    try:
        texts = list(_texts(value, ""))
    except RecursionError:
        raise LilyError(f"{holder} is nested too deep ({place.rstrip(', ')}); remove the row") from None
    for path, text in texts:
        if found := SURROGATE.search(text):
            raise LilyError(
                f"{holder} holds half of a surrogate pair in {place}{path or 'the text'}: {found[0]!r} at "
                f"character {found.start() + 1}; a character was cut in two there: repair it, or remove the row"
            )


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield f"a key of {path or 'it'}", key
            yield from _texts(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{path}[{i}]")


def _checked(
    messages: list[Message], column: str, where: str, row: Mapping[str, Any], tools: Any, system: Any
) -> dict[str, Any]:
    _refuse_media(row, where)
    schemas = read_tools(tools, where)
    messages, where = _with_system(messages, system, where)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        last = messages[-1]["role"]
        raise LilyError(
            f"{where}: column {column!r} must end with an assistant message after a user's, which is the completion; "
            f"its last message ({len(messages)}) has the role {last!r}; remove what follows the last answer, or the row"
        )
    if not any(is_trained(message) for message in messages):
        raise LilyError(
            f"{where}: column {column!r} has weight: 0 (or train: false) on every assistant message, so nothing is "
            "trained; remove the row"
        )
    return {"messages": messages, **({"tools": schemas} if schemas else {}), "where": where}


def _as_messages(value: Any, role: str) -> Any:
    """A prompt or a completion, either of which may be a text, as messages."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _untrained(value: Any) -> Any:
    """Messages that are read for what follows them."""
    listed = from_json(value) if isinstance(value, str) else value
    if not isinstance(listed, list):
        return value
    return [{**message, "weight": 0} if isinstance(message, dict) else message for message in listed]


def _with_system(messages: list[Message], system: Any, where: str) -> tuple[list[Message], str]:
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages, where
    if messages[0]["role"] in ("system", "developer"):
        raise LilyError(f"{where}: has a system text beside the messages and a system message; remove one of them")
    check_text(system, f"{where}: the column of the system text")
    first = read_message({"role": "system", "content": system}, f"{where}, the system text beside the messages")
    return [first, *messages], f"{where} (message 1 is the system text beside the messages)"


def _check_keys(given: Mapping[str, Any], where: str) -> None:
    for key, value in given.items():
        if key in UNSUPPORTED and value not in ("", [], False):
            raise LilyError(f"{where}: key {key!r} is not supported: only whole messages of text; remove it or the row")
        near = difflib.get_close_matches(str(key), READ, n=1, cutoff=0.8)
        if key not in READ and near and near[0] not in given:
            raise LilyError(f"{where}: key {key!r} is unknown; did you mean {near[0]!r}?")


def _refuse_media(row: Mapping[str, Any], where: str) -> None:
    for key in UNSUPPORTED:
        if key in row and row[key] not in (None, "", []) and key != "refusal":
            raise LilyError(f"{where}: column {key!r} beside the messages is not supported: only text is trained")


def _either(given: Mapping[str, Any], keys: tuple[str, str], where: str) -> Any:
    """The value of one of two keys with the same meaning."""
    ours, theirs = (given.get(key) for key in keys)
    if ours is not None and theirs is not None and ours != theirs:
        raise LilyError(f"{where}: keys {keys[0]!r} and {keys[1]!r} have one meaning and differ; remove one of them")
    return theirs if ours is None else ours


# --- parts of a message ---------------------------------------------------------------------------------------------


def _content(value: Any, role: str, where: str) -> tuple[str | None, str]:
    """The text of a message, and of parts of reasoning in it; a tool may also answer with JSON."""
    if value is None or isinstance(value, str):
        return value, ""
    if isinstance(value, list) and (role != "tool" or any(isinstance(p, str) or "type" in p for p in value)):
        return _joined(value, where)
    if role == "tool":
        return json.dumps(value, ensure_ascii=False), ""
    raise LilyError(f"{where}: content holds {_kind(value)}, expected text or a list of parts")


def _joined(parts: list[Any], where: str) -> tuple[str, str]:
    texts: list[str] = []
    thoughts: list[str] = []
    for i, part in enumerate(parts):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("thinking" if kind == "thinking" else "text") if isinstance(part, dict) else None
        if kind not in (*TEXTS, "thinking") or not isinstance(text, str):
            raise LilyError(
                f"{where}: content[{i}] is a part of type {kind!r}, expected {{type: text, text: ...}}; images, audio "
                "and other parts are not trained: remove the part or the row"
            )
        (thoughts if kind == "thinking" else texts).append(text)
    return "".join(texts), "".join(thoughts)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object, which chat templates expect; OpenAI's API has a JSON text."""
    calls = from_json(value) if isinstance(value, str) else value
    if not isinstance(calls, list):
        raise LilyError(f"{where}: tool_calls holds {_kind(value)}, expected a list")
    out = []
    for i, call in enumerate(calls):
        at = f"{where}: tool_calls[{i}]"
        function = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise LilyError(f"{at} is {_kind(call)}, expected {{type: function, function: {{name, arguments}}}}")
        if call.get("type", "function") != "function":
            raise LilyError(f"{at} has the type {call['type']!r}; only calls of functions are supported")
        given = function.get("arguments", function.get("parameters"))
        arguments = (from_json(given) if given.strip() else {}) if isinstance(given, str) else given
        if not isinstance(arguments, dict) and given is not None:
            raise LilyError(f"{at}.function.arguments is no JSON object: {_kind(given)}")
        named = {"id": call["id"]} if call.get("id") is not None else {}
        out.append({"type": "function", **named, "function": {"name": function["name"], "arguments": arguments or {}}})
    return out


def _weight(given: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether a message is trained: a weight of 0 or 1 as in OpenAI's format, or true and false."""
    said = {key: given[key] for key in WEIGHTS if key in given and (key != "loss" or isinstance(given[key], bool))}
    for key, value in said.items():
        if isinstance(value, (list, dict)) or value not in (0, 1):
            raise LilyError(f"{where}: {key} is {value!r}, expected 0 (not trained) or 1 (trained)")
        if value != next(iter(said.values())):
            raise LilyError(f"{where}: {' and '.join(said)} contradict each other; keep one of them")
        if value and role != "assistant":
            raise LilyError(f"{where}: {key} is {value!r} on a message of {role!r}; only the assistant's are trained")
    return bool(next(iter(said.values()), True))


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """The schemas of tools in the shape of the chat templates; None if there are none.

    Args:
        value: a list, or a JSON text of one, with OpenAI's {type, function} or bare functions.
        where: file and row.

    Raises:
        LilyError: for the first that is no tool.
    """
    listed = from_json(value) if isinstance(value, str) and value.strip() else value
    if not listed:
        if isinstance(value, str) and value.strip() not in ("", "[]", "null", "{}"):
            raise LilyError(f"{where}: tools is not JSON, expected a list of schemas: {_kind(value)}")
        return None
    tools = []
    for i, given in enumerate(listed if isinstance(listed, list) else [listed]):
        tool = from_json(given) if isinstance(given, str) else given
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise LilyError(
                f"{where}: tools[{i}] is {_kind(given)} without a name, expected {{type: function, function: "
                "{name, description, parameters}}"
            )
        check_text(tool, f"{where}: tools[{i}]")
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tools


def from_json(text: Any) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def _kind(value: Any) -> str:
    """A value in an error message: what it is, and a text itself."""
    if isinstance(value, (Mapping, list)):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    shown = repr(value)
    return "nothing" if value is None else shown if len(shown) <= 200 else f"{shown[:200]}..."
