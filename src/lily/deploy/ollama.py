"""A Modelfile, with which Ollama makes a model of a base GGUF and a LoRA beside it.

Ollama's templates are Go's, a model's chat template is Jinja's, which can do more. The one is made of what the other
renders: a text before and after each message of a role. It is only written if it then renders the same conversations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MARKS = [f"\ue000{i}\ue000" for i in range(4)]  # no template has such characters
QUOTES = '"""'

Messages = Sequence[tuple[str, str]]  # role and content


@dataclass(frozen=True)
class Turns:
    """A chat template as texts around messages.

    Attributes:
        around: role -> text before and after a message.
        start: text before the first message.
        answer: text before the assistant's answer.
        system: the system message of conversations that have none; None: there is none.
    """

    around: dict[str, tuple[str, str]]
    start: str
    answer: str
    system: str | None

    def rendered(self, messages: Messages) -> str:
        """What Ollama makes of a conversation."""
        if self.system is not None and messages[0][0] != "system":
            messages = [("system", self.system), *messages]
        parts = [f"{self.around[role][0]}{text}{self.around[role][1]}" for role, text in messages]
        return "".join([self.start, *parts, self.answer])

    def go(self) -> str:
        """The template in Ollama's language."""
        cases = [
            f'{"{{ else if" if i else "{{ if"} eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}{_go(after)}'
            for i, (role, (before, after)) in enumerate(self.around.items())
        ]
        loop = "".join([r"{{ range .Messages }}", *cases, r"{{ end }}{{ end }}"])
        return f"{_go(self.start)}{loop}{_go(self.answer)}"


def modelfile(
    base: str, adapter: str, *, tokenizer: Any = None, prompt: str | None = None, chat: bool = True, about: str = ""
) -> tuple[str, str | None]:
    """The text of a Modelfile.

    Args:
        base: GGUF file of the base model, relative to the Modelfile.
        adapter: GGUF file of the LoRA, relative to the Modelfile.
        tokenizer: the base model's; None: unknown, so that Ollama takes the template that the GGUF file holds.
        prompt: the text that the adapter was trained on, around {prompt}, in place of a chat template.
        chat: whether it was trained with the tokenizer's chat template.
        about: which model `base` has to be.

    Returns:
        The text, and why it has no TEMPLATE; None: it has one.
    """
    template, system, missing = _template(tokenizer, prompt, chat)
    no_system = template is not None and ".Messages" in template and '"system"' not in template
    stops = [] if tokenizer is None else _stops(tokenizer, template is not None and prompt is None and chat)
    lines = [
        f"# FROM is the base model as GGUF{f': {about}' if about else ''}",
        f"FROM ./{base}",
        f"ADAPTER ./{adapter}",
        *(["# the template is that of the base model's GGUF file: " + missing] if missing else []),
        *(["# the model's chat template takes no system message, so this one drops it"] if no_system else []),
        *([f"TEMPLATE {QUOTES}{template}{QUOTES}"] if template is not None else []),
        *([f"SYSTEM {QUOTES}{system}{QUOTES}"] if system else []),
        *(f'PARAMETER stop "{stop}"' for stop in stops),
    ]
    return "\n".join(lines) + "\n", missing


def _template(tokenizer: Any, prompt: str | None, chat: bool) -> tuple[str | None, str | None, str | None]:
    """TEMPLATE and SYSTEM, or why there is none."""
    if prompt is not None or (tokenizer is not None and not (chat and tokenizer.chat_template)):
        before, _, after = (prompt or "{prompt}").partition("{prompt}")
        text: str | None = f"{_go(before)}{{{{ .Prompt }}}}{_go(after)}"
        system = None
    elif tokenizer is None:
        return None, None, "the base model's tokenizer is not here"
    else:
        turns = turns_of(tokenizer)
        if turns is None:
            return None, None, "the model's chat template does more than to put texts around messages"
        text, system = turns.go(), turns.system
    if QUOTES in f"{text}{system or ''}":
        return None, None, "the model's template has three quotes, which end a Modelfile's text"
    return text, system, None


def _added_start(tokenizer: Any) -> str:
    """The first token that the tokenizer adds to any text, and llama.cpp with it; others a template has to write."""
    token, number = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    return str(token) if token and tokenizer("a")["input_ids"][:1] == [number] else ""


def turns_of(tokenizer: Any) -> Turns | None:
    """The chat template of a tokenizer as texts around messages; None: it does more than that."""
    begin = _added_start(tokenizer)

    def render(messages: Messages, answering: bool = True) -> str:
        values = [{"role": role, "content": text} for role, text in messages]
        text: str = tokenizer.apply_chat_template(values, tokenize=False, add_generation_prompt=answering)
        return text.removeprefix(begin)  # which llama.cpp puts there

    texts = ("A first one?", "An answer.", "A second one?", "Another.", "And a third one?")
    talk = [("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    told = [("system", "Be brief."), *talk]
    for system in (True, False):
        try:  # templates are programs: they refuse roles, and fail, in any way
            wanted = {tuple(m): render(m) for m in (talk[:1], talk[:3], talk, *((told[:2], told) if system else ()))}
            candidates = sorted(_candidates(render, system), key=lambda t: t.start != "")
            return next(t for t in candidates if all(t.rendered(m) == text for m, text in wanted.items()))
        except Exception:
            continue
    return None


def _candidates(render: Callable[..., str], system: bool) -> Iterator[Turns]:
    """Ways to give the texts between messages to the message before or after; the likely ones first."""
    roles = ("user", "assistant", "user", "assistant")
    whole = render(list(zip(roles, MARKS, strict=True)), False)
    first, asked, again, _, end = _between(whole, MARKS)
    _, answering = _between(render([("user", MARKS[0])]), MARKS[:1])
    for after_answer, before_user in _cuts(again, end):
        around = {}
        start, default = first.removesuffix(before_user), None
        if not first.endswith(before_user):
            continue
        if system:
            before, after, _ = _between(render([("system", MARKS[0]), ("user", MARKS[1])]), MARKS[:2])
            if not after.endswith(before_user):
                continue
            after = after.removesuffix(before_user)
            if start.startswith(before) and start.endswith(after) and len(start) > len(before) + len(after):
                start, default = "", start[len(before) : len(start) - len(after)]
            if not before.startswith(start):
                continue
            around["system"] = before.removeprefix(start), after
        for after_user, before_answer in _cuts(asked, after_answer):
            if answering.startswith(after_user):
                pairs = {"user": (before_user, after_user), "assistant": (before_answer, after_answer)}
                yield Turns({**around, **pairs}, start, answering.removeprefix(after_user), default)


def _between(text: str, marks: Sequence[str]) -> list[str]:
    """The texts before, between and after the marks, each of which is there once."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError(f"{mark!r} is not in the text once")
        parts.append(before)
    return [*parts, text]


def _cuts(text: str, like: str) -> Iterator[tuple[str, str]]:
    """The text in two parts, in all ways; first where the first part is the longest beginning that `like` has too."""
    common = next((i for i, (x, y) in enumerate(zip(text, like, strict=False)) if x != y), min(len(text), len(like)))
    for cut in (*range(common, -1, -1), *range(common + 1, len(text) + 1)):
        yield text[:cut], text[cut:]


def _stops(tokenizer: Any, chat: bool) -> list[str]:
    """Texts at which an answer ends: the end token, and what the chat template puts after an answer."""
    found = [getattr(tokenizer, "eos_token", None) or ""]
    turns = turns_of(tokenizer) if chat else None
    after = turns.around["assistant"][1].strip().partition("\n")[0] if turns is not None else ""
    if after and not (found[0] and after.startswith(found[0])):
        found.append(after)
    return [f for f in dict.fromkeys(found) if f and '"' not in f]


def _go(text: str) -> str:
    """Text as it stands in a Go template."""
    return text.replace("{{", '{{ "{{" }}')
