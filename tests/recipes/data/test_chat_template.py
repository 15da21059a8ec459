"""Chats through a chat template: which tokens have a loss, and that nothing of a chat is lost."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from chat_templates import LLAMA, QWEN, WEATHER, tokenizer_of

from lily.errors import LilyError
from lily.recipes.data import chats, tasks
from lily.recipes.data.chat_template import Chat, text_of
from lily.recipes.data.tasks import IGNORED
from lily.recipes.spec.locations import KeyLocations

RECIPE = SimpleNamespace(task="sft", data=SimpleNamespace(max_length=4096), locations=KeyLocations())

TOOL = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}'  # noqa: E501  fmt: skip


def user(text, **more):
    return {"role": "user", "content": text, **more}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(*arguments, **more):
    calls = [{"id": f"c{i}", "type": "function", "function": {"name": "weather", "arguments": a}}
             for i, a in enumerate(arguments)]  # fmt: skip
    return {"role": "assistant", "content": None, "tool_calls": calls, **more}


def tool(text):
    return {"role": "tool", "tool_call_id": "c0", "content": text}


def encoded(template, messages, tools=None):
    row = chats.conversation(messages, "messages", "t.jsonl, row 3", row={}, tools=tools)
    tokenizer = tokenizer_of(template)
    return tokenizer, tasks.encode([row], RECIPE, tokenizer, None)


def check(template, messages, expected, tools=None):
    """Compare tokens and labels with texts whose odd parts are trained, one list of parts for each trained turn."""
    tokenizer, examples = encoded(template, messages, tools)
    assert len(examples) == len(expected)
    for example, parts in zip(examples, expected, strict=True):
        ids, labels = [], []
        for i, part in enumerate(parts):
            new = tokenizer(part, add_special_tokens=False)["input_ids"]
            ids += new
            labels += new if i % 2 else [IGNORED] * len(new)
        assert tokenizer.decode(example["input_ids"]) == tokenizer.decode(ids)
        assert example["input_ids"] == ids
        assert example["labels"] == labels


def test_of_two_turns_each_answer_is_trained_once():
    messages = [user("a"), said("b"), user("c"), said("d")]
    start = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    more = "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    check(QWEN, messages, [[start, "b<|im_end|>\n"], [f"{start}b<|im_end|>\n{more}", "d<|im_end|>\n"]])
    header = "<|start_header_id|>%s<|end_header_id|>\n\n"
    start = f"<|begin|>{header % 'user'}a<|eot_id|>{header % 'assistant'}"
    more = f"{header % 'user'}c<|eot_id|>{header % 'assistant'}"
    check(LLAMA, messages, [[start, "b<|eot_id|>"], [f"{start}b<|eot_id|>{more}", "d<|eot_id|>"]])


TOOL_CHAT = [{"role": "system", "content": "S"}, user("w?"), call('{"city": "Paris"}'), tool("20 C"), said("warm")]


def test_calls_are_trained_and_results_of_tools_are_not():
    start = (
        f"<|im_start|>system\nS\nTools:\n{TOOL}\n<|im_end|>\n<|im_start|>user\nw?<|im_end|>\n<|im_start|>assistant\n"
    )
    called = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call><|im_end|>\n'
    result = "<|im_start|>user\n<tool_response>20 C</tool_response><|im_end|>\n<|im_start|>assistant\n"
    expected = [[start, called], [start + called + result, "warm<|im_end|>\n"]]
    check(QWEN, TOOL_CHAT, expected, [WEATHER])
    header = "<|start_header_id|>%s<|end_header_id|>\n\n"
    start = f"<|begin|>{header % 'system'}S<|eot_id|>{header % 'user'}{TOOL}\nw?<|eot_id|>{header % 'assistant'}"
    called = '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>'
    result = f"{header % 'ipython'}20 C<|eot_id|>{header % 'assistant'}"
    expected = [[start, called], [start + called + result, "warm<|eot_id|>"]]
    check(LLAMA, TOOL_CHAT, expected, [WEATHER])


@pytest.mark.parametrize("template", [QWEN, LLAMA])
@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}])
def test_a_message_of_weight_0_is_read_but_not_trained(template, off):
    whole, kept = encoded(template, [user("a"), said("b"), user("c"), said("d")])[1]
    (only,) = encoded(template, [user("a"), said("b", **off), user("c"), said("d", weight=1)])[1]
    assert only == kept
    (only,) = encoded(template, [user("a"), said("b"), user("c"), said("d", **off)])[1]
    assert only == whole


@pytest.mark.parametrize("template", [QWEN, LLAMA])
def test_roles_in_unusual_orders_are_trained_where_the_template_writes_them(template):
    end = "<|im_end|>\n" if template is QWEN else "<|eot_id|>"

    def trained(*messages):
        tokenizer, examples = encoded(template, list(messages))
        return [tokenizer.decode([label for label in e["labels"] if label != IGNORED]) for e in examples]

    assert trained(user("a"), user("b"), said("c"), said("d")) == [f"c{end}", f"d{end}"]
    assert trained(said("hello"), user("a"), said("b")) == [f"hello{end}", f"b{end}"]
    middle = {"role": "system", "content": "short!"}
    assert trained(user("a"), said("b"), middle, user("c"), said("d")) == [f"b{end}", f"d{end}"]


def test_an_answer_is_found_where_earlier_messages_are_written_differently_before_another():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think></think>"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    start, answer = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>assistant\n"
    first, second = [start, "<think></think>b<|im_end|>\n"], [f"{start}b{answer}", "<think></think>c<|im_end|>\n"]
    check(template, [user("a"), said("b"), said("c")], [first, second])


def test_reasoning_has_the_name_that_the_template_reads():
    for key in ("reasoning_content", "thinking", "reasoning"):
        messages = [user("a"), said("b", **{key: "old"}), user("c"), said("d", **{key: "hm"})]
        for name in ("reasoning_content", "thinking", "reasoning"):
            tokenizer, examples = encoded(QWEN.replace("reasoning_content", name), messages)
            texts = [tokenizer.decode([label for label in e["labels"] if label != IGNORED]) for e in examples]
            assert texts == ["<think>old</think>\nb<|im_end|>\n", "<think>hm</think>\nd<|im_end|>\n"]
            assert "old" not in tokenizer.decode(examples[1]["input_ids"])


@pytest.mark.parametrize("written", ["{{ args | tojson }}", "{{ '' + args }}", "{{ args }}"])
@pytest.mark.parametrize("given", ['{"city": "Paris", "days": 2}', {"city": "Paris", "days": 2}])
def test_arguments_are_json_in_any_template_whether_given_as_text_or_as_object(written, given):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}"
        f"{{% set args = c.function.arguments %}}{written}{{% endfor %}};{{% endfor %}}"
    )
    tokenizer, (example,) = encoded(template, [user("a"), call(given)])
    assert tokenizer.decode(example["input_ids"]).endswith('weather{"city": "Paris", "days": 2};')


PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
KNOWN = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}[{{ m.role }}]{{ m.content }};{% endif %}"
    "{% endfor %}"
)
OTHERS = "{% for m in messages %}[{{ 'user' if m.role == 'user' else 'assistant' }}]{{ m.content }};{% endfor %}"
DEVELOPER = {"role": "developer", "content": "D"}
LONG = "this model knows no such role and " + "says so at length, " * 20 + "to the end"


@pytest.mark.parametrize(
    ("template", "messages", "tools", "message"),
    [
        (PLAIN, [user("a"), said("b")], [WEATHER], r"row 3, key 'tools\[0\]': the model's chat template leaves it out"),
        (PLAIN, [user("a"), call("{}")], None, r"message 2, key 'tool_calls\[0\].function.name': .* leaves it out"),
        (PLAIN, [user("a"), said("b", thinking="hm")], None, r"row 3, message 2, key 'reasoning_content' \(thinking"),
        (KNOWN, [DEVELOPER, user("a"), said("b")], None, "row 3, message 1, key 'content' of role 'developer'"),
        (KNOWN, [user("a"), said("b"), tool("c"), said("d")], None, "row 3, message 3, key 'content' of role 'tool'"),
        (OTHERS, [user("a"), said("b"), tool("c"), said("d")], None, "message 3, role 'tool': .* role were 'ass"),
        (PLAIN.replace("m.content", "'' if m.role == 'system' else m.content"),
         [{"role": "system", "content": "b"}, user("a"), said("b")], None, "message 1, key 'content' of role 'system'"),
        (LLAMA, [user("a"), call("{}", "{}")], None, "message 2, key 'tool_calls': .* refuses it: one call at once"),
        (LLAMA, [user("a"), call("{}") | {"content": "Let me see."}], None, "message 2, key 'content' of role"),
        ("{% if messages[0].role == 'developer' %}{{ raise_exception('" + LONG + "') }}{% endif %}" + PLAIN,
         [DEVELOPER, user("a"), said("b")], None,
         f"message 1, role 'developer': the model's chat template refuses it: {LONG}; rename the role to system"),
        ("{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no turn') }}"
         "{% endif %}{{ m.content }};{% endfor %}", [user("a"), said("b"), user("c"), user("d"), said("e")], None,
         "message 4, role 'user': .* refuses it: no turn"),
        ("{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + PLAIN, [user("a"), said("b")], [WEATHER],
         "row 3, key 'tools': .* refuses it: no tools"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_express_is_named_with_row_message_key_and_reason(template, messages, tools, message):
    with pytest.raises(LilyError, match=message) as error:
        encoded(template, messages, tools)
    assert str(error.value).startswith("t.jsonl, row 3")
    assert "..." not in str(error.value)


def test_a_prompt_to_answer_is_checked_in_the_same_way():
    with pytest.raises(LilyError, match=r"row 9, key 'tools\[0\]'"):
        text_of(Chat([user("a")], [WEATHER], "row 9"), tokenizer_of(PLAIN), answering=True)
    with pytest.raises(LilyError, match="row 9: messages need a tokenizer with a chat template"):
        text_of(Chat([user("a")], None, "row 9"), tokenizer_of(None))


def test_chats_of_one_shape_are_checked_once(monkeypatch):
    tokenizer, count = tokenizer_of(QWEN), []
    apply = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: count.append(1) or apply(*a, **k))
    for text in ("a", "b", "c"):
        row = chats.conversation([user(text), said(text)], "m", "row", row={})
        tasks.encode([row], RECIPE, tokenizer, None)
        count.append(0)
    firsts, *rest = "".join(map(str, count)).split("0")[:-1]
    assert rest == ["11", "11"]
    assert len(firsts) > 2
    assert re.fullmatch("1+", firsts)
