"""Chats in the shapes in which people keep them: what is read as what, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from chat_templates import WEATHER
from docs_blocks import cells
from recipes_helpers import sft, write_jsonl, write_recipe

from lily.errors import LilyError
from lily.recipes import data, loader
from lily.recipes.data import chats, tables
from lily.recipes.data.chat_template import Chat
from lily.recipes.scoring import answers
from lily.recipes.spec.data import Columns, File

ASK, SAY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def read(messages, **beside):
    return chats.conversation(messages, "m", "t.jsonl, row 2", row={}, **beside)


def called(arguments=None, **more):
    function = {"name": "f", "arguments": {"x": 1} if arguments is None else arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", **more, "function": function}]}


# --- messages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"role": "user", "content": "a", "name": None, "tool_calls": None}, ASK),
        ({"from": "human", "value": "a"}, ASK),
        ({"from": "gpt", "value": "b"}, SAY),
        ({"role": "Human", "value": "a"}, ASK),
        ({"from": "user", "content": "a"}, ASK),
        ({"from": "system", "value": ""}, {"role": "system", "content": ""}),
        ({"role": "developer", "content": "a"}, {"role": "developer", "content": "a"}),
        ({"from": "observation", "value": "1"}, {"role": "tool", "content": "1"}),
        ({"role": "function", "name": "f", "content": "1"}, {"role": "tool", "content": "1", "name": "f"}),
        ({"role": "tool", "tool_call_id": "c", "content": ""}, {"role": "tool", "content": "", "tool_call_id": "c"}),
        ({"role": "tool", "content": {"t": 20}}, {"role": "tool", "content": '{"t": 20}'}),
        ({"role": "tool", "content": [{"t": 20}]}, {"role": "tool", "content": '[{"t": 20}]'}),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, ASK),
        ({"role": "user", "content": ["x", {"type": "text", "text": "y"}]}, {"role": "user", "content": "xy"}),
        ({"role": "assistant", "content": [{"type": "thinking", "thinking": "h"}, {"type": "text", "text": "b"}]},
         {**SAY, "reasoning_content": "h"}),
        ({**SAY, "reasoning_content": "h"}, {**SAY, "reasoning_content": "h"}),
        ({**SAY, "thinking": "h"}, {**SAY, "reasoning_content": "h"}),
        ({**SAY, "reasoning": ""}, SAY),
        ({**SAY, "weight": 1}, SAY),
        ({**SAY, "weight": 0}, {**SAY, "weight": 0}),
        ({**SAY, "weight": 0.0}, {**SAY, "weight": 0}),
        ({**SAY, "train": False}, {**SAY, "weight": 0}),
        ({**SAY, "training": True, "weight": 1}, SAY),
        ({**SAY, "loss": False}, {**SAY, "weight": 0}),
        ({**SAY, "loss": 1.25, "id": "x"}, SAY),
        ({**ASK, "weight": 0}, ASK),
        ({"role": "assistant", "content": None, "weight": 0}, {"role": "assistant", "content": "", "weight": 0}),
        (called() | {"content": None}, called()),
        (called('{"x": 1}'), called()),
        (called('{"x": 1}', id="c"), called(id="c")),
        (called("") , called({})),
        ({"role": "assistant", "tool_calls": '[{"name": "f", "arguments": {"x": 1}}]'}, called()),
        ({"role": "assistant", "tool_calls": [{"name": "f", "parameters": {"x": 1}}]}, called()),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}}, called()),
        ({"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}, called()),
        ({"from": "function_call", "value": '[{"name": "f", "arguments": "{\\"x\\": 1}"}]'}, called()),
    ],
)  # fmt: skip
def test_a_message_is_read_in_one_shape_whatever_its_own(given, expected):
    assert chats.read_message(given, "row") == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"content": "a"}, "role None is unknown"),
        ({"role": "robot", "content": "a"}, "role 'robot' is unknown, expected one of system"),
        ({"role": ["user"], "content": "a"}, r"role \['user'\] is unknown"),
        ({"role": "user", "from": "gpt", "content": "a"}, "keys 'role' and 'from' have one meaning and differ"),
        ({"role": "user", "content": "a", "value": "b"}, "keys 'content' and 'value' have one meaning"),
        ({"role": "user", "text": "a"}, "content is missing or null, expected text; the message has role, text"),
        ({"role": "user", "content": None}, "content is missing or null"),
        ({"role": "assistant", "content": None}, "content is missing or null"),
        ({"role": "assistant", "content": " \n"}, "content of the assistant is empty, so only its end token"),
        ({"role": "assistant", "content": "", "tool_calls": []}, "only its end token would be trained"),
        ({"role": "user", "content": 5}, "content holds 5, expected text or a list of parts"),
        ({"role": "user", "content": {"text": "a"}}, "content holds an object of 1, expected text"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]},
         r"content\[1\] is a part of type 'image_url'.*images"),
        ({"role": "user", "content": [{"type": "image"}]}, r"content\[0\] is a part of type 'image'"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "part of type 'input_audio'"),
        ({"role": "user", "content": [{"text": "a"}]}, r"content\[0\] is a part of type None"),
        ({**SAY, "refusal": "no"}, "key 'refusal' is not supported"),
        ({**ASK, "images": ["x.png"]}, "key 'images' is not supported"),
        ({**SAY, "train_detail": [{"begin": 0}]}, "key 'train_detail' is not supported: only whole messages"),
        ({**SAY, "wieght": 0}, "key 'wieght' is unknown; did you mean 'weight'"),
        ({**SAY, "weight": 0.5}, r"weight is 0.5, expected 0 \(not trained\) or 1"),
        ({**SAY, "weight": 2}, "weight is 2, expected 0"),
        ({**SAY, "weight": "0"}, "weight is '0', expected 0"),
        ({**SAY, "weight": [0]}, r"weight is \[0\], expected 0"),
        ({**SAY, "train": "no"}, "train is 'no', expected 0"),
        ({**SAY, "weight": 1, "train": False}, "weight and train contradict"),
        ({**ASK, "train": True}, "train is True on a message of 'user'; only the assistant's are trained"),
        ({**ASK, "tool_calls": [{"name": "f"}]}, "key 'tool_calls' belongs to an assistant's message, not to 'user'"),
        ({**ASK, "thinking": "h"}, "key 'thinking' belongs to an assistant"),
        ({**SAY, "thinking": 5}, "key 'thinking' holds 5, expected one text"),
        ({**SAY, "thinking": "x", "reasoning_content": "y"}, "key 'thinking' holds 'x', expected one text"),
        ({**SAY, "tool_calls": {"name": "f"}}, "tool_calls holds an object of 1, expected a list"),
        ({**SAY, "tool_calls": ["f"]}, r"tool_calls\[0\] is 'f', expected"),
        ({**SAY, "tool_calls": [{"function": {"arguments": "{}"}}]}, r"tool_calls\[0\] is an object of 1, expected"),
        (called("{x: 1}"), r"tool_calls\[0\].function.arguments is no JSON object: '\{x: 1\}'"),
        (called([1]), r"arguments is no JSON object: a list of 1"),
        (called("[1]"), r"arguments is no JSON object: '\[1\]'"),
        (called(type="custom"), r"tool_calls\[0\] has the type 'custom'"),
        ({"from": "function_call", "value": "f(x=1)"}, r"the function_call is not JSON, expected .*: 'f\(x=1\)'"),
        ({"from": "function_call"}, "the function_call is not JSON"),
    ],
)  # fmt: skip
def test_a_message_that_cannot_be_trained_as_it_stands_is_refused(given, message):
    with pytest.raises(LilyError, match=f"^t.jsonl, row 2, message 3: .*{message}"):
        read([ASK, SAY, given])


@pytest.mark.parametrize(
    ("messages", "key"),
    [
        ([{"role": "user", "content": "cut \ud83d"}, SAY], "message 1, content"),
        ([ASK, {"from": "gpt", "value": "\ude00 cut"}], "message 2, value"),
        ([ASK, {**SAY, "thinking": "\ud83d"}], "message 2, thinking"),
        ([ASK, {**SAY, "content": [{"type": "text", "text": "\ud83d"}]}], r"message 2, content\[0\].text"),
        ([ASK, called({"x": "\ud83d"})], r"message 2, tool_calls\[0\].function.arguments.x"),
        ([ASK, {**SAY, "name\ud83d": "x"}], "message 2, a key of it"),
    ],
)
def test_half_a_surrogate_pair_is_named_with_its_row_message_and_key(messages, key):
    with pytest.raises(
        LilyError, match=f"^t.jsonl, row 2: column 'm' holds half of a surrogate pair in {key}: .* at character "
    ) as error:
        read(messages)
    str(error.value).encode()
    tool = {"name": "f", "description": "\ud83d"}
    with pytest.raises(LilyError, match=r"row 2: tools\[0\] holds half of a surrogate pair in description"):
        read([ASK, SAY], tools=[tool])
    with pytest.raises(LilyError, match="row 2: the column of the system text holds half of a surrogate pair in"):
        read([ASK, SAY], system="\ud83d")
    assert read([{**ASK, "content": "whole \U0001f600"}, SAY])["messages"][0]["content"] == "whole \U0001f600"


def test_half_a_surrogate_pair_that_a_json_text_writes_as_an_escape_is_named_too():
    wanted = r"^t.jsonl, row 2, message 2 holds half of a surrogate pair in tool_calls\[0\].function.arguments.x"
    with pytest.raises(LilyError, match=wanted):
        read([ASK, called('{"x": "\\ud83d"}'), SAY])
    with pytest.raises(LilyError, match=r"row 2: tools\[0\] holds half of a surrogate pair in description"):
        read([ASK, SAY], tools='[{"name": "f", "description": "\\ud83d"}]')


def test_endless_nesting_is_one_error():
    nested = {}
    for _ in range(5000):
        nested = {"x": nested}
    with pytest.raises(LilyError, match=r"row 2: column 'm' is nested too deep \(message 2\)"):
        read([ASK, called(nested)])


DOCS = cells("docs/recipes.md")
ROWS = [cell for cell in DOCS if cell[1].startswith('`{"') and cell[2].startswith("`{")]
MESSAGES = [code for cell in DOCS for code in re.findall(r"`([^`]*)`", cell[1]) if re.match(r'{"(role|from)":', code)]


@pytest.mark.parametrize("cell", ROWS, ids=lambda cell: cell[0])
def test_the_rows_that_the_docs_show_are_read(chat_model, tmp_path, cell):
    row, columns = json.loads(re.match("`(.*?)`", cell[1])[1]), yaml.safe_load(cell[2].strip("`"))
    got = splits(chat_model, tmp_path, [row] * 20, columns).train[0]
    assert got.get("messages") == [{**ASK, "content": "hi"}, {**SAY, "content": "yes"}] or got["completion"] in (
        "yes",
        "salut",
    )


@pytest.mark.parametrize("code", MESSAGES)
def test_the_messages_that_the_docs_show_are_read(code):
    assert chats.read_message(json.loads(code), "row")["role"] in ("assistant", "tool")


def test_the_docs_show_every_shape():
    assert (len(ROWS), len(MESSAGES)) == (5, 3)


# --- conversations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "column 'm' holds 'hello', expected a list of messages"),
        (None, "column 'm' holds nothing, expected a list"),
        ([], "column 'm' holds a list of 0"),
        (["hi"], "column 'm' holds a list of 1"),
        ([ASK], r"must end with an assistant message .* its last message \(1\) has the role 'user'"),
        ([ASK, SAY, ASK], r"must end with an assistant message .* its last message \(3\) has the role 'user'"),
        ([ASK, called(), {"role": "tool", "content": "1"}], r"its last message \(3\) has the role 'tool'"),
        ([SAY], "must end with an assistant message after a user's"),
        ([ASK, {**SAY, "weight": 0}], "weight: 0 .* on every assistant message, so nothing is trained"),
    ],
)
def test_a_conversation_without_an_answer_is_refused(messages, message):
    with pytest.raises(LilyError, match=f"^t.jsonl, row 2: .*{message}"):
        read(messages)


def test_a_conversation_may_be_a_json_text():
    assert read(json.dumps([ASK, SAY])) == {"messages": [ASK, SAY], "where": "t.jsonl, row 2"}


BARE = WEATHER["function"]


@pytest.mark.parametrize(
    "tools", [[WEATHER], [BARE], json.dumps([WEATHER]), json.dumps([BARE]), [json.dumps(BARE)], WEATHER]
)
def test_tools_are_read_in_one_shape(tools):
    assert read([ASK, SAY], tools=tools)["tools"] == [WEATHER]


def test_no_tools_are_none_and_what_is_no_tool_is_refused():
    for nothing in (None, [], "", "[]", "null"):
        assert "tools" not in read([ASK, SAY], tools=nothing)
    for wrong, message in (
        ("weather(city)", r"tools is not JSON.*'weather\(city\)'"),
        ([{"type": "function"}], r"tools\[0\] is an object of 1 without a name"),
        ([WEATHER, 5], r"tools\[1\] is 5"),
    ):
        with pytest.raises(LilyError, match=f"^t.jsonl, row 2: {message}"):
            read([ASK, SAY], tools=wrong)


def test_a_system_text_beside_the_messages_is_the_first_message():
    row = read([ASK, SAY], system="S")
    assert row["messages"] == [{"role": "system", "content": "S"}, ASK, SAY]
    assert "message 1 is the system text" in row["where"]
    assert read([ASK, SAY], system="")["messages"] == [ASK, SAY]
    with pytest.raises(LilyError, match="row 2: has a system text beside the messages and a system message"):
        read(row["messages"], system="S")


# --- rows of a recipe -----------------------------------------------------------------------------------------------


def splits(chat_model, folder, table, columns, **more):
    values = sft(chat_model, write_jsonl(folder / "t.jsonl", table), folder)
    values["data"] |= {"columns": columns, **more}
    return data.load_splits(loader.load_recipe(write_recipe(folder, values)))


def test_sharegpt_rows_with_system_and_tools_are_read_without_naming_these(chat_model, tmp_path):
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    table = [{"conversations": talk, "system": "S", "tools": json.dumps([BARE])}] * 20
    row = splits(chat_model, tmp_path, table, {"messages": "conversations"}).train[0]
    assert row["messages"] == [{"role": "system", "content": "S"}, ASK, SAY]
    assert row["tools"] == [WEATHER]
    table = [{"m": [ASK, SAY], "functions": [BARE]}] * 20
    assert splits(chat_model, tmp_path, table, {"messages": "m"}).train[0]["tools"] == [WEATHER]
    table = [{"m": [ASK, SAY], "api": [BARE], "rules": "S"}] * 20
    row = splits(chat_model, tmp_path, table, {"messages": "m", "tools": "api", "system": "rules"}).train[0]
    assert (row["tools"], len(row["messages"])) == ([WEATHER], 3)


def test_of_a_prompt_and_a_completion_in_messages_the_completion_is_trained(chat_model, tmp_path):
    table = [{"p": [ASK, SAY, ASK], "c": [SAY]}] * 20
    row = splits(chat_model, tmp_path, table, {"prompt": "p", "completion": "c"}).train[0]
    assert row["messages"] == [ASK, {**SAY, "weight": 0}, ASK, SAY]
    table = [{"p": [ASK], "c": "b"}, {"p": "a", "c": [SAY]}] * 10
    got = splits(chat_model, tmp_path, table, {"prompt": "p", "completion": "c"})
    assert [r["messages"] for r in got.train] == [[ASK, SAY]] * len(got.train)
    with pytest.raises(LilyError, match=r"row 1: messages, tools and a system text need .* data\.chat: false"):
        splits(chat_model, tmp_path, table, {"prompt": "p", "completion": "c"}, chat=False)
    with pytest.raises(LilyError, match="column 'c' is empty in 20 of 20 rows"):
        splits(chat_model, tmp_path, [{"p": [ASK], "c": ""}] * 20, {"prompt": "p", "completion": "c"})


def test_alpacas_input_follows_the_instruction_and_is_not_left_out_silently(chat_model, tmp_path):
    table = [{"instruction": f"do {i}", "input": "" if i % 2 else "it", "output": "b"} for i in range(20)]
    columns = {"prompt": "instruction", "input": "input", "completion": "output"}
    got = splits(chat_model, tmp_path, table, columns, split={"validation": 0.1})
    prompts = {row["prompt"] for row in got.train + got.validation}
    assert prompts == {f"do {i}" if i % 2 else f"do {i}\nit" for i in range(20)}
    assert data.prompt_of(table[0], Columns(**columns), "row 1") == "do 0\nit"
    with pytest.warns(
        UserWarning, match="a text in 'input' beside 'instruction', which is left out; data.columns.input"
    ):
        splits(chat_model, tmp_path, table, {"prompt": "instruction", "completion": "output"})
    with pytest.raises(LilyError, match=r"data\.columns\.input: is appended to the prompt"):
        splits(chat_model, tmp_path, table, {"messages": "m", "input": "input"})
    with pytest.raises(LilyError, match="row 1: column 'input' holds 5, expected text"):
        splits(chat_model, tmp_path, [{**table[0], "input": 5}] * 20, columns)


def test_tools_and_a_system_text_that_are_named_go_with_a_prompt_of_text_too(chat_model, tmp_path):
    table = [{"instruction": "a", "input": "x", "output": "b", "system": "S", "tools": [BARE]}] * 20
    names = {"prompt": "instruction", "input": "input", "completion": "output", "system": "system", "tools": "tools"}
    row = splits(chat_model, tmp_path, table, names).train[0]
    assert row["messages"] == [{"role": "system", "content": "S"}, {**ASK, "content": "a\nx"}, SAY]
    assert row["tools"] == [WEATHER]
    assert data.prompt_of(table[0], Columns(**names), "row 1") == Chat(
        row["messages"][:2], [WEATHER], "row 1 (message 1 is the system text beside the messages)"
    )


def test_images_beside_the_messages_are_refused(chat_model, tmp_path):
    with pytest.raises(LilyError, match="row 1: column 'images' beside the messages is not supported"):
        splits(chat_model, tmp_path, [{"m": [ASK, SAY], "images": ["x.png"]}] * 20, {"messages": "m"})


def test_other_tools_or_calls_make_another_conversation(chat_model, tmp_path):
    def talk(i, name):
        call = {"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": {}}]}
        return {"m": [{**ASK, "content": f"q {i}"}, call, {"role": "tool", "content": "1"}, SAY]}

    table = [talk(i, name) for i in range(15) for name in ("f", "g")]
    got = splits(chat_model, tmp_path, [*table, *table], {"messages": "m"}, deduplicate=True)
    assert len(got.train + got.validation + got.test) == 30


def test_what_arrow_fills_in_is_no_argument_of_a_call_and_no_key_of_a_schema(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    calls = [[{"name": "f", "arguments": {"x": 1}}], [{"name": "g", "arguments": {"y": 2}}]]
    rows = [{"m": [ASK, {"role": "assistant", "content": None, "tool_calls": call}], "note": None} for call in calls]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    got = tables.read_rows(File(path=str(tmp_path / "t.parquet")))
    assert all("note" in row for row in got)
    arguments = [read(row["m"])["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in got]
    assert arguments == [{"x": 1}, {"y": 2}]


def test_a_prompt_is_what_comes_before_the_last_answer_in_any_shape():
    asked = {"from": "human", "value": "a"}
    for talk in ([asked], [asked, {"from": "gpt", "value": "b"}], [asked, {"from": "gpt", "value": ""}]):
        got = data.prompt_of({"c": talk, "tools": [BARE]}, Columns(messages="c"), "row 1")
        assert got == Chat([ASK], [WEATHER], "row 1")
    assert data.prompt_of({"p": [ASK]}, Columns(prompt="p", completion="c"), "row 1") == Chat([ASK], None, "row 1")
    with pytest.raises(LilyError, match="row 1: column 'c' has nothing before the assistant's message"):
        data.prompt_of({"c": [SAY]}, Columns(messages="c"), "row 1")


def test_the_expected_answer_is_the_last_that_is_trained():
    row = read([ASK, {**SAY, "content": " yes "}, ASK, {**SAY, "weight": 0}])
    assert data.completion_of(row) == "yes"
    assert data.completion_of(read([ASK, called()])) == '[{"name": "f", "arguments": {"x": 1}}]'


@pytest.mark.parametrize(
    ("answer", "message"), [(called(), "has tool calls"), ({**SAY, "thinking": "h"}, "has reasoning")]
)
def test_an_answer_that_exact_match_cannot_compare_is_refused(chat_model, tmp_path, answer, message):
    path = write_jsonl(tmp_path / "t.jsonl", [{"m": [ASK, answer]}])
    values = sft(chat_model, path, tmp_path)
    values["data"]["columns"] = {"messages": "m"}
    recipe = loader.load_recipe(write_recipe(tmp_path, values))
    with pytest.raises(LilyError, match=f"metrics: .*t.jsonl, row 1: the last answer {message}"):
        answers.expected_answers(data.rows_of(recipe.data.train, recipe), recipe)
