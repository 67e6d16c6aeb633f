"""What a person sees of a run on the terminal: live, in a log, and at its end."""

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from fasttune import metrics, report, terminal
from fasttune.metrics import Sample
from tests.test_report import SETTINGS, make_result, make_steps


class Screen(io.StringIO):
    def isatty(self):
        return True


def make_reporter(width=100, live=False, **arguments):
    console = Console(file=Screen() if live else io.StringIO(), width=width, force_terminal=live, _environ={})
    return terminal.Reporter(console=console, **arguments), console.file


def printed(result, width=100):
    reporter, file = make_reporter(width)
    reporter.finish(result)
    return file.getvalue()


def test_durations():
    texts = [report.duration(s) for s in (4.24, 59.96, 161, 3900, 3599.7)]
    assert texts == ["4.2 s", "1 min 00 s", "2 min 41 s", "1 h 05 min", "1 h 00 min"]
    assert [terminal.clock(s) for s in (7, 161, 3909, -1)] == ["0:07", "2:41", "1:05:09", "0:00"]


def test_plain_lines_where_stderr_is_no_terminal():
    reporter, file = make_reporter(width=80)
    reporter.start("quickstart", "2 cores", SETTINGS, 400, usd_per_hour=2.5)
    reporter.training()
    for step in make_steps(400):
        reporter.step(step)
    reporter.stop()
    assert "\x1b" not in file.getvalue()
    lines = [line for line in file.getvalue().splitlines() if line.startswith("step ")]
    assert len(lines) == 21  # the first and every 20th of 400
    assert re.fullmatch(
        r"step 400/400 · loss 0\.005 · 2,000 tokens/s · 0:00 left · 3\.5 GiB · (\$0\.\d{4}|under \$0\.0001)", lines[-1]
    )
    assert "0:10 left" in lines[-2]  # 20 steps of 0.5 s


def test_dollars_count_from_the_creation_with_the_price_the_start_brings(monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now_s[0])
    reporter, file = make_reporter()
    now_s[0] += 1800  # loading
    reporter.start("t", "h", [], 1, usd_per_hour=2.5)
    reporter.training()
    reporter.step(make_steps(1)[0])
    assert file.getvalue().endswith(" · $1.25\n")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_live_bar_fits_one_line_and_drops_the_least_wanted_first(width):
    reporter, file = make_reporter(width, live=True)
    reporter.start("quickstart", "2 cores", SETTINGS, 1200, usd_per_hour=2.5)
    reporter.training()
    reporter.step(dataclasses.replace(make_steps(1)[0], step=1100))
    reporter.stop()
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").splitlines()
    assert all(len(line) <= width for line in frames)
    bar = next(line for line in reversed(frames) if "step 1,100/1,200" in line)
    assert "loss 2.000" in bar and "━" in bar
    assert ("0:50 left" in bar) == (width >= 80)
    assert ("3.5 GiB" in bar) == (width >= 80)


def test_the_bar_of_several_processes_says_what_each_does_and_how_late_the_slowest_is():
    reporter, file = make_reporter(width=140)
    reporter.start("t", "h", [], 1, ranks=4)
    reporter.training()
    reporter.step(dataclasses.replace(make_steps(1)[0], straggler=1.25))
    assert " · 2,000 tokens/s · " in file.getvalue()
    assert " · 500 each, the slowest 1.25 × the mean time · " in file.getvalue()


def test_a_log_file_gets_lines_even_when_colour_is_forced():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)  # FORCE_COLOR does this
    reporter = terminal.Reporter(console=console)
    reporter.start("t", "h", [], 1)
    reporter.training()
    reporter.step(make_steps(1)[0])
    assert "\x1b[?25l" not in console.file.getvalue()  # a live display hides the cursor
    assert "step 1/1" in console.file.getvalue()


def test_stop_closes_the_bar_after_an_exception_and_twice():
    reporter, file = make_reporter(live=True)
    reporter.start("t", "h", [], 5)
    reporter.training()
    with pytest.raises(RuntimeError):
        try:
            raise RuntimeError
        finally:
            reporter.stop()
    reporter.stop()
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize("width", [40, 80])
def test_progress_is_a_bar_with_the_time_left(width):
    """As of a benchmark: minutes lie between two shares."""
    now_s = [0.0]
    file = Screen()
    console = Console(file=file, width=width, force_terminal=True, _environ={}, get_time=lambda: now_s[0])
    reporter = terminal.Reporter(console=console)
    for what, share in (("repeat 1: x", 0.0), ("repeat 1: y", 0.25), ("y [2]", 0.5), ("a long name " * 20, 0.75)):
        reporter.progress(what, share)
        now_s[0] += 400
        if share:
            reporter._progress.refresh()
    reporter.stop()
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").splitlines()
    assert all(len(line) <= width for line in frames)
    assert any(re.fullmatch(r"y \[2\] +50 % [━╸╺]+ 0:13:20 left \S *", line) for line in frames), frames
    assert any(re.fullmatch(r"a long n.* 0:06:40 left \S *", line) for line in frames), frames
    assert "-:--" not in file.getvalue()  # rich's word for a time that is not known yet
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") > 0


def test_a_clock_runs_while_something_lasts_and_is_gone_before_the_next_line():
    reporter, file = make_reporter(live=True)
    reporter.note("loading the model …")
    assert "0:00:00" in file.getvalue() and reporter._progress is not None
    reporter.note("the adapter was trained on nf4 weights")  # a fact
    assert reporter._progress is None
    reporter.note("importing torch …")
    terminal.close()  # as the command line does before the message of an error
    reporter.stop()
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 2


def test_progress_lines_of_a_log_come_with_each_new_thing_or_by_the_clock(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now_s[0])
    reporter, file = make_reporter()
    for what, share, took_s in (("a [1]", 0.0, 1), ("a [1]", 0.1, 20), ("a [1]", 0.2, 1), ("b", 0.5, 1), ("b", 1.0, 1)):
        reporter.progress(what, share)
        now_s[0] += took_s
    assert file.getvalue().splitlines() == ["a [1] …", "a [1] … 20%", "b … 50%"]


def test_warnings_are_shown_at_once_and_again_at_the_end(tmp_path):
    reporter, file = make_reporter(width=60)
    long = "3 rows were dropped [data.train] because " + "they were too long " * 5
    reporter.warn(long)
    reporter.warn(long)
    assert file.getvalue() == f"warning: {long}\n"  # one line in a log, and not twice
    reporter.finish(make_result(tmp_path, make_steps(9), warnings=[long, "another one"]))
    assert file.getvalue().count(f"warning: {long}\n") == 2
    assert "warning: another one\n" in file.getvalue()


def test_quiet_keeps_warnings_and_failures_only(tmp_path):
    reporter, file = make_reporter(quiet=True)
    reporter.note("loading")
    reporter.start("t", "h", SETTINGS, 1)
    reporter.training()
    reporter.step(make_steps(1)[0])
    reporter.finish(make_result(tmp_path, make_steps(1)))
    assert file.getvalue() == ""
    reporter.warn("mind this")
    reporter.finish(make_result(tmp_path, make_steps(1), status="failed", error="out of memory"))
    assert file.getvalue() == "warning: mind this\nquickstart: failed: out of memory\n"


def test_panel_gives_the_reason_of_automatic_settings_and_escapes_markup():
    reporter, file = make_reporter()
    reporter.start("my [bold]run[/bold]", "2 cores [x86]", SETTINGS, 1)
    text = file.getvalue()
    assert "my [bold]run[/bold]" in text and "2 cores [x86]" in text
    assert re.search(r"model\s+some/model\s*│", text)
    assert re.search(r"dtype\s+float32 – this \[chip\] has no bf16", text)


def test_final_report_says_what_is_counted_and_what_is_not_known(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "run.json").touch()
    text = " ".join(printed(make_result(tmp_path, make_steps(56)), width=120).split())
    for part in (
        "completed quickstart",
        "loss 2.000 → 0.036 – 0.02 × the first step's",
        "speed 2,000 tokens/s – padding not counted; median of 53 steady steps",
        "peak memory 3.5 GiB",
        "time 2 min 41 s",
        "cost not known – no price: set usd_per_hour",
        "first step 4.2 s",
        "tokens 56,000 – 22,400 of them supervised",
        "padding 9.1 %",
        "MFU not known – needs a chip",
        "matmul share 41.2 % – of the matmul rate measured on this machine, 0.35 TFLOP/s",
        "attention sdpa · packing off · patched layers 7",
        f"adapter {tmp_path}/adapter",
        f'load it peft.AutoPeftModelForCausalLM.from_pretrained("{tmp_path}/adapter")',
    ):
        assert part in text
    assert "report.html" not in text  # it is not there


def test_failed_run_is_red_with_its_error_and_needs_no_step(tmp_path):
    reporter, file = make_reporter(live=True)
    reporter.finish(make_result(tmp_path, [], status="failed", error="step 1: loss is nan [/red]"))
    assert re.search(r"\x1b\[1;31mfailed", file.getvalue())
    assert "step 1: loss is nan [/red]" in file.getvalue()
    assert "no step finished" in file.getvalue()


def test_the_end_names_the_next_commands_unbroken(tmp_path):
    run = tmp_path / "my runs with a long name" / "first"
    (run / "adapter").mkdir(parents=True)
    said = {"base_model_name_or_path": "owner/base", "r": 12, "rank_pattern": {"q_proj": 20}}
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    lines = printed(make_result(run, make_steps(9), name="my run"), width=60).splitlines()
    assert lines[-4:] == [
        f"ask it   fasttune generate '{run}' --chat",
        f"score it fasttune eval '{run}'",
        f"merge it fasttune merge '{run}' --out merged",
        f"serve    vllm serve owner/base --enable-lora --lora-modules 'my-run={run}/adapter' --max-lora-rank 32",
    ]
    lines = printed(make_result(run, make_steps(9), plain_text=True), width=60).splitlines()
    assert lines[-3] == f"ask it   fasttune generate '{run}' --prompt 'Once upon a time'"
    assert lines[-2].startswith("merge it ")  # nothing scores a plain text by itself
    (run / "adapter").rename(run / "model")
    lines = printed(make_result(run, make_steps(9)), width=60).splitlines()
    assert lines[-1] == f"serve    vllm serve '{run}/model'" and "merge it" not in "\n".join(lines)
    (run / "model").rename(run / "lost")
    assert "vllm" not in printed(make_result(run, make_steps(9), status="failed"))


def test_in_a_narrow_terminal_the_next_commands_stand_on_lines_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs") / "quickstart-20261127-051216"  # as a run is called by itself
    (run / "adapter").mkdir(parents=True)
    reporter, file = make_reporter(width=60, live=True)
    reporter.finish(make_result(run, make_steps(9)))
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()).splitlines()
    for command in (f"generate {run} --chat", f"eval {run}", f"merge {run} --out merged"):
        (line,) = [line for line in lines if f"fasttune {command}" in line]
        assert len(line) <= 60


@pytest.mark.parametrize(
    ("share", "told"),
    [
        (0.775, "31 of 40 answers are right after training (77.5 %)"),
        (1.0, "all 40 answers are right"),
        (0.0, "none of the 40 answers is right"),
    ],
)
def test_samples_are_marked_beside_the_exact_match(tmp_path, share, told):
    sample = Sample("How many?", "#### 25", "24", "#### 25", False, True)
    match = metrics.ExactMatch(40, before=0.0, after=share)
    result = make_result(tmp_path, make_steps(9), samples=[sample], exact_match=match)
    text = printed(result, width=120)
    assert told in text and re.search(r"^ *before ✗ +after ✓ *$", text, re.MULTILINE)
    report.write_html(tmp_path / "report.html", result, make_steps(9))
    page = (tmp_path / "report.html").read_text()
    assert told in page and "Before training ✗" in page and "After training ✓" in page


@pytest.mark.parametrize("width", [30, 120])
def test_samples_side_by_side_escaped_and_clipped(tmp_path, width):
    sample = Sample("How [many]?\x1b[2J", "#### 25", "before [b]x[/b]", "after " + "q" * 2000)
    text = printed(make_result(tmp_path, make_steps(9), samples=[sample]), width)
    table = text[text.index("held-out prompt") : text.index("#### 25")]
    assert "[many]?�[2J" in table and "[b]x[/b]" in table
    assert all(len(line) <= width for line in table.splitlines())
    assert table.count("q") == terminal.SAMPLE_CHARACTERS - 1 - len("after ") and "…" in table
    assert re.search(r"^ *before +after *$", table, re.MULTILINE)
