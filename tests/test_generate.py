"""Answers on the tiny model: the same alone and in a batch, gone on with after a kill, with the trained template."""

import contextlib
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import goldens
import pytest

from fasttune import cli
from fasttune.data import formats, turns
from fasttune.errors import DataError, OutputError
from fasttune.tools import generate, questions, trained_model

pytestmark = pytest.mark.usefixtures("unsloth")

PROMPTS = ["2 + 3?", "How many apples are left when Ana eats 4 of 9?", "x", "Name a colour, please. " * 6, "Why?"]


@pytest.fixture(scope="module")
def speaker(finished_run: Path) -> Any:
    opened = trained_model.open_run(str(finished_run))
    return generate.load(opened, "float32", generate.Sampling(max_new_tokens=12), print)


def rows(folder: Path, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps({"question": text, "answer": "5"}) + "\n" for text in PROMPTS))
    return path


def lines(path: Path) -> dict[int, str]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({one["row"] for one in found}) == len(found)
    return {one["row"]: one["text"] for one in found}


def alone(speaker: Any) -> list[str]:
    return [speaker.batch([speaker.prompt([formats.turn("user", text)])])[0].text for text in PROMPTS]


def test_an_answer_is_the_same_alone_and_in_a_batch(speaker: Any) -> None:
    together = speaker.batch([speaker.prompt([formats.turn("user", text)]) for text in PROMPTS])
    assert [answer.text for answer in together] == alone(speaker)
    assert len(set(alone(speaker))) > 1  # so the comparison can fail
    assert all(answer.tokens == 12 and answer.finish == "length" for answer in together)


def test_the_adapter_answers_not_the_base(speaker: Any) -> None:
    with speaker.model.disable_adapter():
        base = alone(speaker)
    assert all(one != other for one, other in zip(alone(speaker), base, strict=True))


def test_a_turn_ends_where_the_template_ends_it(tiny_tokenizer: Any) -> None:
    """ChatML on a base model whose EOS is another token: it would never stop."""
    from types import SimpleNamespace

    from fasttune.core import decoding

    tiny_tokenizer.eos_token = "<|endoftext|>"
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    ids = tiny_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert decoding.stop_ids(model, tiny_tokenizer) == sorted(ids)
    assert decoding.stop_ids(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7])), tiny_tokenizer) == [
        *sorted(ids),
        7,
    ]


def test_a_generation_config_of_others_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fasttune.core import pretrained

    folder = shutil.copytree(pretrained.builtin("builtin:tiny"), tmp_path / "tiny")
    for changes in ({"eos_token_id": "x"}, {"bad_words_ids": 5}):
        (folder / "generation_config.json").write_text(json.dumps(changes))
        assert cli.main(["generate", str(folder), "--prompt", "x", "--max-new-tokens", "2"]) == 2
        assert next(iter(changes)) in capsys.readouterr().err.splitlines()[-1]


def test_an_answer_ends_at_the_first_stop_token(speaker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = speaker.prompt([formats.turn("user", PROMPTS[0])])
    seen: list[list[int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(speaker, "_answer", seen.append)
        speaker.batch([prompt])
    [whole] = seen
    monkeypatch.setattr(speaker, "stops", [whole[3]])
    ended = speaker.batch([prompt, speaker.prompt([formats.turn("user", PROMPTS[1])])])[0]
    assert (ended.tokens, ended.finish) == (whole.index(whole[3]) + 1, "stop")


def test_a_file_is_gone_on_with(speaker: Any, finished_run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from fasttune import terminal

    opened, source, out = trained_model.open_run(str(finished_run)), rows(tmp_path), tmp_path / "out.jsonl"
    reporter = terminal.Reporter(quiet=True)

    def answer(**settings: Any) -> dict[str, Any]:
        return generate.answer_file(speaker, opened, str(source), out, 2, {"dtype": "x", **settings}, reporter)

    real, calls = speaker.batch, []

    def killed_in_the_second(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(speaker, "batch", killed_in_the_second)
        answer()
    assert len(lines(out)) == 2 and 4 in lines(out)  # the longest first
    with out.open("a") as file:
        file.write('{"row": 3, "te')  # torn by a kill
    before = out.read_bytes()
    for changed, told in [
        (lambda: answer(dtype="y"), "dtype=x, now y"),
        (lambda: rows(tmp_path).write_text('{"prompt": "Hi"}\n') and answer(), "rows"),
    ]:
        with pytest.raises(OutputError, match=told):
            changed()
        assert out.read_bytes() == before
    rows(tmp_path)
    done = answer()
    goldens.contract("generate --file --json", done)
    assert (done["answered"], done["answered_before"], done["left_out"]) == (3, 2, 0)
    assert lines(out) == dict(enumerate(alone(speaker), 1))
    assert answer()["answered"] == 0
    out.write_text("mine\n")
    with pytest.raises(OutputError, match="line 1 is no answer"):
        answer()
    assert out.read_text() == "mine\n"
    (tmp_path / "out.jsonl.made-by.json").unlink()
    with pytest.raises(OutputError, match="not written by"):
        answer()


def test_other_weights_are_told(finished_run: Path, tmp_path: Path) -> None:
    source = str(rows(tmp_path))
    opened = trained_model.open_run(str(finished_run))
    of_run = questions.identity(opened, source, {})
    assert of_run == questions.identity(trained_model.open_run(str(finished_run / "adapter")), source, {})
    base = questions.identity(trained_model.open_run("builtin:tiny"), source, {})
    assert (base["base"], base["adapter"]) == ("builtin:tiny", None) and base["rows"] == of_run["rows"]
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes((finished_run / "adapter" / weights.name).read_bytes())
    assert questions._weights(str(tmp_path)) == of_run["adapter"]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
    assert questions._weights(str(tmp_path)) != of_run["adapter"]


USER, SYSTEM = [formats.turn("user", "Hi")], [formats.turn("system", "Be kind.")]


def test_lines_of_a_conversation_can_be_edited_and_come_back() -> None:
    """As a person types: a letter taken back, and the arrow key for the line before."""
    code = "from fasttune.tools.generate import ask\nfor _ in range(3): print(repr(ask()), flush=True)"
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(keyboard, 1024)
        seen = seen.partition(text)[2]

    for keys, wanted in ((b"2 + 4\x7f3\n", b"'2 + 3'"), (b"\x1b[A\n", b"'2 + 3'"), (b"\x04", b"None")):
        until(b"you: ")
        os.write(keyboard, keys)
        until(wanted)
    assert process.wait() == 0
    os.close(keyboard)


def test_the_clock_of_the_loading_does_not_run_beside_a_conversation(finished_run: Path) -> None:
    command = [sys.executable, "-m", "fasttune.cli", "generate", str(finished_run), "--chat"]
    keyboard, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    os.write(keyboard, b"/exit\n")
    said = b""
    with contextlib.suppress(OSError):  # of a terminal that nobody has any more
        while part := os.read(keyboard, 1024):
            said += part
    os.close(keyboard)
    assert process.wait() == 0, said
    loading, _, conversation = said.partition(b"you: ")
    hidden, shown = b"\x1b[?25l", b"\x1b[?25h"  # the cursor
    assert loading.count(hidden) == loading.count(shown) > 0 and hidden not in conversation


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "Hi"}, USER),
        ({"prompt": USER}, USER),
        ({"prompt": "Hi", "completion": "Ho"}, USER),
        ({"question": "Hi", "answer": "Ho"}, USER),
        ({"query": "Hi"}, USER),
        ({"instruction": "Hi", "output": "Ho", "system": "Be kind."}, SYSTEM + USER),
        ({"messages": USER}, USER),
        ({"messages": [*USER, formats.turn("assistant", "Ho")]}, USER),
        (
            {"messages": [*USER, formats.turn("assistant", "Ho"), *USER]},
            [*USER, formats.turn("assistant", "Ho"), *USER],
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, USER),
        *(
            ({"conversations": [{"from": "human", "value": "Hi"}, {"from": speaker, "value": '{"name": "f"}'}]}, USER)
            for speaker, role in turns.SHAREGPT_ROLES.items()
            if role == "assistant"
        ),
    ],
)
def test_the_question_part_of_every_form(tmp_path: Path, row: dict[str, Any], messages: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    [(number, question)] = questions.read(str(path), {}, None, "train", {})
    assert (number, question) == (2, formats.Conversation(messages, []))
    [(_, question)] = questions.read(str(path), {}, "Be brief.", "train", {})
    first = messages if messages[0]["role"] == "system" else [formats.turn("system", "Be brief."), *messages]
    assert question == formats.Conversation(first, [])


def test_rows_that_cannot_be_asked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "Hi"}\n{"problem": " "}\n')
    columns = {"question": "problem"}
    skipped: dict[int, str] = {}
    [(_, good)] = questions.read(str(path), columns, None, "train", skipped)
    assert good == formats.Conversation(USER, []) and skipped == {2: "empty question"}
    for text in ('{"text": "Once"}', '{"other": 1}'):
        path.write_text(text)
        with pytest.raises(DataError):
            list(questions.read(str(path), columns, None, "train", {}))


def test_half_a_character_is_told(
    speaker: Any, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A row with one is left out and counted; what was typed with one is refused."""
    from fasttune import terminal

    source, opened = tmp_path / "rows.jsonl", trained_model.open_run(str(finished_run))
    source.write_text('{"prompt": "Hi"}\n{"prompt": "a \\ud83d b"}\n')
    done = generate.answer_file(speaker, opened, str(source), tmp_path / "out", 2, {}, terminal.Reporter(quiet=True))
    assert (done["answered"], done["left_out"]) == (1, 1)
    source.write_text('{"prompt": "a \\ud83d b"}\n')
    with pytest.raises(DataError, match=r"row 1: half a character \('\\ud83d'\)"):
        generate.answer_file(speaker, opened, str(source), tmp_path / "none", 2, {}, None)
    for arguments in (["--prompt", "caf\udce9"], ["--prompt", "x", "--system", "caf\udce9"]):
        assert cli.main(["generate", "builtin:tiny", *arguments]) == 2
        assert rf"{arguments[-2]}: 'caf\udce9' is no UTF-8" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert cli.main(["generate", str(finished_run), "--chat"]) == 2
    assert "--chat: what was typed is no UTF-8" in capsys.readouterr().err


def test_a_prompt_too_long_for_the_model_is_told(speaker: Any) -> None:
    with pytest.raises(DataError, match="2,048 positions"):
        generate.answer_one(speaker, "word " * 600, None, print)


def test_a_conversation_remembers_and_forgets(speaker: Any) -> None:
    told: list[str] = []
    said = iter(["2 + 3?", "", "Why?", "/new", "x", "/exit", "never asked"])
    messages = generate.converse(speaker, "Be brief.", lambda: next(said), told.append)
    assert [turn["content"] for turn in messages if turn["role"] != "assistant"] == ["Be brief.", "x"]
    said = iter(["2 + 3?", "Why?"])
    messages = generate.converse(speaker, None, lambda: next(said, None), lambda text: None)
    first = speaker.batch([speaker.prompt(messages[:1])])[0].text
    second = speaker.batch([speaker.prompt(messages[:3])])[0].text
    assert [turn["content"] for turn in messages] == ["2 + 3?", first, "Why?", second]
    assert second != speaker.batch([speaker.prompt([messages[2]])])[0].text  # with what was said before
    assert "".join(told).count("\n") >= 3


def test_a_temperature_is_sampled_by_its_seed(speaker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(seed: int) -> str:
        monkeypatch.setattr(speaker, "sampling", generate.Sampling(12, temperature=1.5, seed=seed))
        return str(speaker.batch([speaker.prompt(USER)])[0].text)

    assert answer(1) == answer(1) != answer(2)


def test_plain_text_runs_continue_plain_text(speaker: Any, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = None
    raw = generate.Speaker(speaker.model, tiny_tokenizer, True, speaker.sampling)
    assert raw.prompt(USER) == "Hi" and raw.stops == [tiny_tokenizer.eos_token_id]


def test_turns_without_a_template_are_refused(
    speaker: Any, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from fasttune import terminal
    from fasttune.core import pretrained

    shutil.copytree(pretrained.builtin("builtin:tiny"), tmp_path / "bare")
    for path in (tmp_path / "bare").iterdir():
        if path.name == "chat_template.jinja":
            path.unlink()
        elif path.name == "tokenizer_config.json":
            told = json.loads(path.read_text())
            path.write_text(json.dumps({key: value for key, value in told.items() if key != "chat_template"}))
    for option in (["--chat"], ["--prompt", "x", "--system", "Be brief."]):
        assert cli.main(["generate", str(tmp_path / "bare"), *option]) == 2
        said = capsys.readouterr().err.splitlines()
        assert f"{option[-2] if len(option) > 1 else option[0]} would be ignored: the model has no chat" in said[-1]
    monkeypatch.setattr(speaker, "raw", True)
    path, opened = tmp_path / "rows.jsonl", trained_model.open_run(str(finished_run))
    path.write_text('{"prompt": "Hi"}\n' + json.dumps({"messages": [*SYSTEM, *USER]}) + "\n")
    with pytest.raises(DataError, match="row 2 has several turns"):
        generate.answer_file(speaker, opened, str(path), tmp_path / "out", 2, {}, terminal.Reporter(quiet=True))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_whole_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"row": 1, "text": "x", "tokens": 1, "finish": "stop"}
    with questions.opened(tmp_path / "out", {}) as answers:
        answers.add([line])
        before = (tmp_path / "out").read_bytes()
        real = os.write

        def full(number: int, data: bytes) -> int:
            if len(data) < 20:
                raise OSError(28, "No space left on device")
            return real(number, data[:20])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OutputError, match="No space left on device"):
            answers.add([line])
    assert (tmp_path / "out").read_bytes() == before


def test_a_closed_pipe_ends_quietly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def closed(options: Any) -> dict[str, Any]:
        raise BrokenPipeError

    monkeypatch.setattr(generate, "run", closed)
    with (tmp_path / "stdout").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["generate", "builtin:tiny", "--prompt", "x"]) == 141


def test_the_command_streams_a_prompt(speaker: Any, finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = speaker.batch([speaker.prompt([formats.turn("user", PROMPTS[1])])])[0].text
    arguments = ["generate", str(finished_run), "--prompt", PROMPTS[1], "--max-new-tokens", "12"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == shown + "\n"
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    goldens.contract("generate --prompt --json", result)
    assert (result["text"], result["tokens"], result["finish"]) == (shown, 12, "length")


def test_the_command_talks(finished_run: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("2 + 3?\n/exit\n"))
    assert cli.main(["generate", str(finished_run), "--chat", "--max-new-tokens", "4", "--json"]) == 0
    turns = json.loads(capsys.readouterr().out)["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]

    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.stdin, "readline", interrupted)
    assert cli.main(["generate", str(finished_run), "--chat"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "fasttune: interrupted"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere/at/all", "--prompt", "x"], "no such folder"),
        (["builtin:tiny", "--file", "nowhere.jsonl"], "no file nowhere.jsonl"),
        (["builtin:tiny", "--prompt", " "], "--prompt is empty"),
        (["builtin:tiny", "--prompt", "x", "--out", "y"], "--out would be ignored"),
        (["builtin:tiny", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["builtin:tiny", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_a_user_error_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", *arguments]) == 2
    said = capsys.readouterr()
    assert told in said.err and said.err.count("\n") == 1 and not said.out
