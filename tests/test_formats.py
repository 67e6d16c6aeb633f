"""Rows → conversations: forms are recognised by their keys; a wrong row is named, a useless one is dropped and why."""

from decimal import Decimal
from typing import Any

import pytest

from fasttune.data import formats
from fasttune.data.formats import Conversation, Unusable
from fasttune.errors import DataError

PLACE = "rows.jsonl line 7"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def convert(row: dict[str, Any]) -> Conversation | str:
    return formats.convert(row, formats.detect(row, PLACE), PLACE)


QUESTION, ANSWER = turn("user", "q"), turn("assistant", "a")
WORDLESS = {"role": "assistant", "content": None, "tool_calls": CALL}
SYSTEM, PAIR = turn("system", "s"), [QUESTION, ANSWER]


@pytest.mark.parametrize(
    ("row", "messages", "answers"),
    [
        ({"question": "q", "answer": "a"}, PAIR, [1]),
        ({"query": "q", "response": "a", "type": "t", "original_question": "o"}, PAIR, [1]),
        ({"prompt": "q", "completion": "a"}, PAIR, [1]),
        ({"prompt": [*PAIR, QUESTION], "completion": [ANSWER]}, PAIR * 2, [3]),  # the prompt is only read
        ({"instruction": "q", "output": "a"}, PAIR, [1]),
        ({"instruction": "q", "input": None, "output": "a", "system": "", "history": None}, PAIR, [1]),
        ({"instruction": "q", "input": " ", "output": "a", "history": []}, PAIR, [1]),
        ({"instruction": "q", "input": "more", "output": "a"}, [turn("user", "q\n\nmore"), ANSWER], [1]),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]},
            [SYSTEM, turn("user", "q1"), turn("assistant", "a1"), turn("user", "q2"), turn("assistant", "a2"), *PAIR],
            [2, 4, 6],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                    {"from": "observation", "value": "seen"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                ]
            },
            [SYSTEM, *PAIR, turn("tool", "seen"), WORDLESS],
            [2, 4],
        ),
        ({"messages": [SYSTEM, *PAIR, *PAIR]}, [SYSTEM, *PAIR, *PAIR], [2, 4]),
        ({"messages": [turn("developer", "d"), *PAIR]}, [turn("developer", "d"), *PAIR], [2]),
        ({"messages": [QUESTION, ANSWER | {"weight": 0}, QUESTION, ANSWER | {"weight": 1}]}, PAIR * 2, [3]),
        (
            {"messages": [QUESTION | {"name": None}, {"role": "assistant", "tool_calls": CALL}]},
            [QUESTION, WORDLESS],
            [1],
        ),
        (
            {"messages": [QUESTION, turn("assistant", "", tool_calls=CALL), turn("tool", "2", name="add"), ANSWER]},
            [QUESTION, turn("assistant", "", tool_calls=CALL), turn("tool", "2", name="add"), ANSWER],
            [1, 3],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("q", "", "r")]}, ANSWER]},
            [turn("user", "qr"), ANSWER],
            [1],
        ),
    ],
)
def test_each_form_is_recognised_and_becomes_turns(
    row: dict[str, Any], messages: list[dict[str, Any]], answers: list[int]
) -> None:
    found = convert(row)
    assert isinstance(found, Conversation)
    assert (found.messages, found.answers, found.tools) == (messages, answers, None)


def test_text_stays_text() -> None:
    assert convert({"text": " once upon a time\n", "id": 3}) == " once upon a time\n"


@pytest.mark.parametrize("tools", [[TOOL], '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'])
def test_tools_are_kept(tools: Any) -> None:
    found = convert({"messages": PAIR, "tools": tools})
    assert isinstance(found, Conversation)
    assert found.tools == [TOOL]


def test_columns_are_renamed() -> None:
    row = formats.rename({"problem": "q", "solution": "a"}, {"question": "problem", "answer": "solution"}, PLACE)
    assert formats.detect(row, PLACE) == "question_answer"
    found = formats.convert(row, "question_answer", PLACE)
    assert isinstance(found, Conversation)
    assert found.messages == PAIR
    with pytest.raises(DataError, match=f"data.columns: {PLACE} has no solution; it has problem"):
        formats.rename({"problem": "q"}, {"question": "problem", "answer": "solution"}, PLACE)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"a": 1, "b": 2}, "has the columns a, b; expected one of messages | .*map yours with data.columns"),
        ({"question": "q"}, "has the columns question; expected"),
        ({"question": 3, "answer": "a"}, "question is int 3, expected text"),
        ({"prompt": PAIR, "completion": "a"}, "expected a list of turns, found str 'a'"),
        ({"messages": "hello"}, "expected a list of turns, found str"),
        ({"messages": ["hello"]}, "a turn needs a role .*found str 'hello'"),
        ({"messages": [turn("robot", "x")]}, "a turn needs a role .*robot"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]}, "pictures"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "content is int 3"),
        ({"messages": PAIR, "tools": "no json"}, "tools is str 'no json'"),
        ({"messages": PAIR, "tools": "[" * 100_000}, "tools is str .*nested too deeply"),
        ({"messages": [QUESTION, ANSWER | {"tool_calls": 7}]}, "a tool call is int 7"),
        ({"messages": [QUESTION, ANSWER | {"tool_calls": [{"function": {"name": 3}}]}]}, "a tool call is dict"),
        (
            {"messages": [QUESTION, ANSWER | {"function_call": {"name": "add", "arguments": "[" * 100_000}}]},
            "the arguments of a call of add are nested too deeply",
        ),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "a turn needs `from` .*alien"),
        ({"conversations": [{"from": "human", "value": None}]}, "a turn needs `from`"),
        ({"instruction": "q", "output": "a", "history": "h"}, "history is str 'h'"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "history is list"),
        ({"instruction": "q", "input": 3, "output": "a"}, "input is int 3"),
    ],
)
def test_a_wrong_row_is_named(row: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=f"^data: {PLACE}:? .*{told}") as caught:
        convert(row)
    assert "\n" not in str(caught.value)


def test_mixed_forms_are_named() -> None:
    with pytest.raises(DataError, match=rf"{PLACE} has no query and no response .*question, answer.*one format"):
        formats.convert({"question": "q", "answer": "a"}, "query_response", PLACE)


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(DataError) as caught:
        convert({"messages": ["x" * 10_000]})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [QUESTION]}, "no assistant turn"),
        ({"messages": [SYSTEM, ANSWER, QUESTION, ANSWER]}, "begins with the assistant"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "begins with the assistant"),
        ({"messages": [QUESTION, turn("assistant", " \n")]}, "empty answer"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "empty answer"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]}, "empty answer"),
        ({"question": "q", "answer": ""}, "empty answer"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f"}]},
            "a function_call turn that is no JSON of name and arguments",
        ),
        ({"instruction": "q", "output": " "}, "empty answer"),
        ({"instruction": "q", "output": "a", "history": [["q", ""]]}, "empty answer"),
        ({"question": " ", "answer": "a"}, "empty question"),
        ({"text": "\n"}, "empty text"),
    ],
)
def test_a_row_that_teaches_nothing_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=f"^{reason}$"):
        convert(row)


WRONG = {"role": "assistant", "content": "WRONG"}
GPT = {"from": "gpt", "value": "WRONG"}


@pytest.mark.parametrize(
    "flag",
    [{"weight": 0}, {"weight": "0"}, {"train": False}, {"loss": "false"}, {"loss_weight": 0.0}, {"masked": True}],
)
def test_a_turn_that_says_so_is_not_trained_on(flag: dict[str, Any]) -> None:
    human = {"from": "human", "value": "q"}
    other = {"from": "gpt", "value": "a"} | dict.fromkeys(flag)  # as Parquet fills it
    for row in (
        {"messages": [QUESTION, WRONG | flag, QUESTION, ANSWER | {"weight": 1, "train": True}]},
        {"conversations": [human, GPT | flag, human, other]},
        {"prompt": [QUESTION], "completion": [WRONG | flag, QUESTION, ANSWER]},
    ):
        found = convert(row)
        assert isinstance(found, Conversation)
        assert found.messages == [QUESTION, WRONG, QUESTION, ANSWER]  # templates see no flag
        assert (found.answers, found.left_out) == ([3], True)


@pytest.mark.parametrize(
    ("turn_of", "told"),
    [
        ({"train_detail": [{"begin_offset": 0}]}, "a turn has train_detail, which is not known"),
        ({"loss_mask": 1}, "a turn has loss_mask"),
        ({"weight": 0.5}, "weight is float 0.5; it can be 1 or true, 0 or false"),
        ({"train": "maybe"}, "train is str 'maybe'"),
        ({"content": [{"type": "text", "text": "a", "loss_weight": 0}]}, "a part of a turn has weight 0"),
        ({"content": [{"type": "reasoning", "text": "a"}]}, "'reasoning'.*reasoning_content of the turn"),
        ({"content": [{"type": "input_audio", "data": "a"}]}, "'input_audio'.*sound and video cannot be used"),
        ({"content": [{"type": "text", "words": "a"}]}, "which holds no text"),
        ({"content": ["a"]}, "a part of a turn is str 'a'; expected"),
        ({"tool_calls": 7}, "a tool call is int 7"),
        ({"tool_calls": [{"name": "add", "kwargs": {"a": 1}}]}, "a tool call has kwargs and no arguments"),
        (
            {"tool_calls": [{"name": "add", "arguments": {"a": Decimal("9" * 5000)}}]},
            "thousands of digits: write it as text",
        ),
    ],
)
def test_what_a_turn_says_and_we_do_not_follow_is_named(turn_of: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=f"^data: {PLACE}: .*{told}") as caught:
        convert({"messages": [QUESTION, ANSWER | turn_of]})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", ["text", "value", "content"])
def test_text_parts_of_other_tools_are_read(key: str) -> None:
    parts = [{"type": "text", key: "q", "image": None}, {"type": "input_text", "text": "r"}]
    parts.append({"type": "text"})  # of Parquet, where its text was null
    found = convert({"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert isinstance(found, Conversation) and found.messages[0]["content"] == "qr"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PAIR},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": "[]"},
        {"question": "q", "answer": "a"},
        {"query": "q", "response": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"instruction": "q", "output": "a"},
    ],
)
def test_system_and_history_stand_beside_any_form(row: dict[str, Any]) -> None:
    found = convert({**row, "system": "s", "history": '[["q1", "a1"]]'})
    assert isinstance(found, Conversation)
    assert found.messages == [SYSTEM, turn("user", "q1"), turn("assistant", "a1"), *PAIR]
    assert found.answers == ([4] if isinstance(row.get("prompt"), list) else [2, 4])  # what a prompt holds is only read
    assert convert({**row, "system": " ", "history": ""}) == convert({**row, "system": None})


def test_a_system_turn_goes_before_the_column() -> None:
    found = convert({"messages": [SYSTEM, *PAIR], "system": "other", "history": [["q1", "a1"]]})
    assert isinstance(found, Conversation)
    assert found.messages == [SYSTEM, turn("user", "q1"), turn("assistant", "a1"), *PAIR]


@pytest.mark.parametrize("form", [{"messages": PAIR}, {"prompt": "q", "completion": "a"}, {"text": "a"}])
@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"chosen": "a", "rejected": "b"}, r"is preference data \(chosen, rejected\)"),
        ({"rejected_response": "b"}, r"is preference data \(rejected_response\).*remove such columns"),
        ({"label": False}, "is preference data: label is false.*keep the rows where it is true"),
        ({"label": "False"}, ".*label is false"),
        ({"kto_tag": False}, ".*kto_tag is false"),
        ({"images": ["a.png"]}, "has images: pictures, sound and video cannot be used"),
        ({"image": {"bytes": b"x"}}, "has image: "),
        ({"audio_path": "a.wav"}, "has audio_path: "),
        ({"videos": ["a.mp4"]}, "has videos: "),
    ],
)
def test_rows_that_would_teach_something_else_are_refused_by_name(
    form: dict[str, Any], more: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=f"^data: {PLACE} {told}") as caught:
        formats.check_row(form | more, PLACE)
    assert len(str(caught.value)) < 300
    empty: dict[str, Any] = {name: [] if isinstance(value, list) else None for name, value in more.items()}
    formats.check_row(form | empty | {"label": True, "images": [None], "imagery": "x", "score": 0}, PLACE)


def test_chosen_answers_can_be_asked_for_by_name() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "kto_tag": True}
    with pytest.raises(DataError, match=r"set 'data.columns=\{completion: chosen\}'"):
        formats.check_row(row, PLACE)
    renamed = formats.rename(row, {"completion": "chosen"}, PLACE)
    formats.check_row(renamed, PLACE)
    assert renamed == {"prompt": "q", "completion": "a", "kto_tag": True}
    with pytest.raises(DataError, match=r"set 'data.columns=\{messages: chosen\}'"):
        formats.check_row({"prompt": "q", "chosen": PAIR, "rejected": PAIR}, PLACE)


def test_a_row_can_be_marked_as_a_whole() -> None:
    for flag in ({"weight": 0}, {"train": False}, {"loss": "0"}):
        with pytest.raises(Unusable, match="^marked as not to be trained on$"):
            convert({"question": "q", "answer": "a", **flag})
    assert convert({"question": "q", "answer": "a", "weight": 0.7}) == convert({"question": "q", "answer": "a"})


@pytest.mark.parametrize(
    ("turns", "more"),
    [
        ([ANSWER | {"tool_calls": []}], {}),  # an empty list is no call
        ([ANSWER | {"tool_calls": "", "function_call": None}], {}),
        ([{"role": "assistant", "tool_calls": [CALL[0]["function"]]}], {"tool_calls": CALL}),
        ([{"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 1}'}}], {"tool_calls": CALL}),
        ([{"role": "assistant", "tool_calls": [{"name": "add", "args": {"a": 1}}]}], {"tool_calls": CALL}),
        ([{"role": "assistant", "tool_calls": [{"name": "add", "parameters": {"a": 1}}]}], {"tool_calls": CALL}),
    ],
)
def test_calls_come_in_todays_form(turns: list[dict[str, Any]], more: dict[str, Any]) -> None:
    found = convert({"messages": [QUESTION, *turns]})
    assert isinstance(found, Conversation)
    assert found.messages[1] == (ANSWER if not more else {"role": "assistant", "content": None, **more})


def test_functions_are_tools_and_their_answers_come_from_a_tool() -> None:
    turns = [{"role": "assistant", "function_call": CALL[0]["function"]}, turn("function", "2", name="add"), ANSWER]
    found = convert({"messages": [QUESTION, *turns], "functions": [TOOL["function"]]})
    assert isinstance(found, Conversation)
    assert (found.tools, found.messages[2]) == ([TOOL], turn("tool", "2", name="add"))
    bare = convert({"messages": PAIR, "tools": [TOOL["function"]]})
    assert isinstance(bare, Conversation) and bare.tools == [TOOL]


def test_a_sharegpt_turn_calls_and_thinks_as_one_of_openai_does() -> None:
    said = {"from": "gpt", "value": "a", "tool_calls": CALL, "reasoning_content": "r"}
    row = {"conversations": [{"from": "human", "value": "q"}, said]}
    found = convert(row)
    assert isinstance(found, Conversation) and formats.not_used(row, "conversations") == set()
    assert found.messages[1] == ANSWER | {"tool_calls": CALL, "reasoning_content": "r"}


def test_what_a_function_call_turn_thinks_is_kept() -> None:
    said = "<think>add them</think>\n" + '[{"name": "add", "arguments": {"a": 1}}]'
    found = convert({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": said}]})
    assert isinstance(found, Conversation)
    assert found.messages[1] == WORDLESS | {"content": "<think>add them</think>"}


@pytest.mark.parametrize(
    ("said", "arguments"), [("", {}), (None, {}), ('{"a": "1"}', {"a": "1"}), ("no json", "no json")]
)
def test_arguments_are_an_object_where_they_can_be(said: str | None, arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": said}}
    found = convert({"messages": [QUESTION, ANSWER | {"tool_calls": [call]}]})
    assert isinstance(found, Conversation)
    assert call["function"]["arguments"] == said, "the row itself is left alone"
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
