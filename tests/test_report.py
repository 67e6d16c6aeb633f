"""What a person sees of a run: the terminal (live and plain), run.json and report.html."""

import dataclasses
import html
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from fasttune import metrics, plots, report, terminal
from fasttune.errors import OutputError
from fasttune.metrics import Backend, ExactMatch, RunResult, Sample, Setting, StepMetrics

SETTINGS = [Setting("model", "some/model"), Setting("dtype", "float32", "this [chip] has no bf16")]


def make_steps(count):
    return [StepMetrics(i, 2.0 / i, 1e-3, 1.0, 1000, 400, 100, 0, 0.5, 2000.0, 3.5) for i in range(1, count + 1)]


def make_result(output_dir, steps, **changes):
    result = RunResult(
        status="completed",
        name="quickstart",
        output_dir=str(output_dir),
        steps=len(steps),
        first_loss=steps[0].loss if steps else None,
        last_loss=steps[-1].loss if steps else None,
        tokens=1000 * len(steps),
        loss_tokens=400 * len(steps),
        padding_fraction=0.0909,
        tokens_per_s=metrics.median_rate(steps),
        loss_tokens_per_s=metrics.median_rate(steps, "loss_tokens"),
        steady_steps=len(metrics.steady(steps)),
        seconds_to_first_step=4.25 if steps else None,
        wall_s=161.0,
        peak_memory_gib=3.5,
        mfu=None,
        fraction_of_measured_matmul=0.412,
        measured_matmul_tflops=0.353,
        flops_formula=metrics.FLOPS_FORMULA,
        cost_usd=None,
        usd_per_hour=None,
        usd_per_million_tokens=None,
        backend=Backend("unsloth 1", "sdpa", "off", 7, "off", "float32"),
        versions={"torch": "2.13.0"},
        hardware={"cpu_model": "Some CPU", "memory_gib": 23.4, "gpus": [], "driver": None},
        settings=SETTINGS,
    )
    return dataclasses.replace(result, **changes)


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


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "$0.00"), (0.00003, "under $0.0001"), (0.0003, "$0.0003"), (0.25, "$0.25"), (1234.5, "$1,234.50")],
)
def test_dollars_stay_readable(amount, text):
    assert report.usd(amount) == text


def test_durations():
    texts = [report.duration(s) for s in (4.24, 59.96, 161, 3900, 3599.7)]
    assert texts == ["4.2 s", "1 min 00 s", "2 min 41 s", "1 h 05 min", "1 h 00 min"]
    assert [terminal.clock(s) for s in (7, 161, 3909, -1)] == ["0:07", "2:41", "1:05:09", "0:00"]


def test_plain_lines_where_stderr_is_no_terminal():
    reporter, file = make_reporter(width=80)
    reporter.start("quickstart", "2 cores", SETTINGS, 400, usd_per_hour=2.5)
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


def test_plain_lines_of_slow_steps_come_by_the_clock(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now_s[0])
    reporter, file = make_reporter()
    reporter.start("t", "h", [], 2000)
    for step in make_steps(30):
        now_s[0] += 4.0
        reporter.step(step)
    shown = [int(n) for n in re.findall(r"^step (\d+)/", file.getvalue(), re.MULTILINE)]
    assert shown == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28]


def test_dollars_count_from_the_creation_with_the_price_the_start_brings(monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now_s[0])
    reporter, file = make_reporter()
    now_s[0] += 1800  # loading
    reporter.start("t", "h", [], 1, usd_per_hour=2.5)
    reporter.step(make_steps(1)[0])
    assert file.getvalue().endswith(" · $1.25\n")


def test_speed_is_the_median_of_recent_steps_without_the_first():
    reporter, file = make_reporter()
    reporter.start("t", "h", [], 3)
    for number, speed in ((1, 5.0), (2, 300.0), (3, 310.0)):
        reporter.step(dataclasses.replace(make_steps(1)[0], step=number, tokens_per_s=speed))
    assert "step 3/3 · loss 2.000 · 305 tokens/s" in file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_live_bar_fits_one_line_and_drops_the_least_wanted_first(width):
    reporter, file = make_reporter(width, live=True)
    reporter.start("quickstart", "2 cores", SETTINGS, 1200, usd_per_hour=2.5)
    reporter.step(dataclasses.replace(make_steps(1)[0], step=1100))
    reporter.stop()
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").splitlines()
    assert all(len(line) <= width for line in frames)
    bar = next(line for line in reversed(frames) if "step 1,100/1,200" in line)
    assert "loss 2.000" in bar and "━" in bar
    assert ("0:50 left" in bar) == (width >= 80)
    assert ("3.5 GiB" in bar) == (width >= 80)


def test_a_log_file_gets_lines_even_when_colour_is_forced():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)  # FORCE_COLOR does this
    reporter = terminal.Reporter(console=console)
    reporter.start("t", "h", [], 1)
    reporter.step(make_steps(1)[0])
    assert "\x1b[?25l" not in console.file.getvalue()  # a live display hides the cursor
    assert "step 1/1" in console.file.getvalue()


def test_stop_closes_the_bar_after_an_exception_and_twice():
    reporter, file = make_reporter(live=True)
    reporter.start("t", "h", [], 5)
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
    assert any(re.fullmatch(r"y \[2\] +50 % [━╸╺]+ 0:13:20 left *", line) for line in frames), frames
    assert any(line.startswith("a long n") and line.rstrip().endswith("0:06:40 left") for line in frames), frames
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1


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
    assert re.search(r"dtype\s+float32  this \[chip\] has no bf16", text)


def test_final_report_says_what_is_counted_and_what_is_not_known(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "run.json").touch()
    text = " ".join(printed(make_result(tmp_path, make_steps(56)), width=120).split())
    for part in (
        "completed quickstart",
        "loss 2.000 → 0.036 0.02 × the first step's",
        "speed 2,000 tokens/s padding not counted; median of 53 steady steps",
        "peak memory 3.5 GiB",
        "time 2 min 41 s",
        "cost not known no price: set usd_per_hour",
        "first step 4.2 s",
        "tokens 56,000 22,400 of them supervised",
        "padding 9.1 %",
        "MFU not known needs a chip",
        "matmul share 41.2 % of the matmul rate measured on this machine, 0.35 TFLOP/s",
        "attention sdpa · packing off · patched layers 7",
        f"adapter {tmp_path}/adapter",
        f'load it peft.AutoPeftModelForCausalLM.from_pretrained("{tmp_path}/adapter")',
    ):
        assert part in text
    assert "report.html" not in text  # it is not there


def test_final_report_with_a_price(tmp_path):
    priced = make_result(tmp_path, make_steps(56), cost_usd=0.0003, usd_per_hour=2.5, usd_per_million_tokens=0.35)
    text = " ".join(printed(priced).split())
    assert "cost $0.0003 at $2.50 per hour; $0.35 per million tokens at the steady speed" in text


def test_one_step_is_not_enough_to_say_a_speed(tmp_path):
    text = printed(make_result(tmp_path, make_steps(1)))
    assert "1 step;" in text
    assert re.search(r"speed +not known  not enough steps to say", text)


def test_failed_run_is_red_with_its_error_and_needs_no_step(tmp_path):
    reporter, file = make_reporter(live=True)
    reporter.finish(make_result(tmp_path, [], status="failed", error="step 1: loss is nan [/red]"))
    assert re.search(r"\x1b\[1;31mfailed", file.getvalue())
    assert "step 1: loss is nan [/red]" in file.getvalue()
    assert "no step finished" in file.getvalue()


@pytest.mark.parametrize("width", [30, 120])
def test_samples_side_by_side_escaped_and_clipped(tmp_path, width):
    sample = Sample("How [many]?\x1b[2J", "#### 25", "before [b]x[/b]", "after " + "q" * 2000)
    text = printed(make_result(tmp_path, make_steps(9), samples=[sample]), width)
    table = text[text.index("held-out prompt") : text.index("#### 25")]
    assert "[many]?�[2J" in table and "[b]x[/b]" in table
    assert all(len(line) <= width for line in table.splitlines())
    assert table.count("q") == terminal.SAMPLE_CHARACTERS - 1 - len("after ") and "…" in table
    assert re.search(r"^ *before +after *$", table, re.MULTILINE)


def test_the_exact_match_is_told_where_there_is_one(tmp_path):
    result = make_result(tmp_path, make_steps(9), exact_match=ExactMatch(40, 0.025, 0.55))
    assert re.search(r"exact match +2\.5 % → 55\.0 % +on 40 held-out problems, before and after", printed(result))
    assert "exact match" not in printed(make_result(tmp_path, make_steps(9)))


def test_json_is_valid_whatever_the_numbers(tmp_path):
    path = tmp_path / "run.json"
    result = make_result(tmp_path, make_steps(2), last_loss=math.nan, hardware={"x": [math.inf, {"y": -math.inf}]})
    report.write_json(path, {**vars(result), "path": tmp_path, "odd": "é \udc80"})

    def refuse(constant):
        raise AssertionError(constant)

    data = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert data["last_loss"] is None and data["hardware"] == {"x": [None, {"y": None}]}
    assert data["settings"][1]["reason"] == SETTINGS[1].reason
    assert data["path"] == str(tmp_path) and data["odd"] == "é \udc80"


def test_json_line_is_one_ascii_line_without_nan():
    line = report.to_json_line({"loss": math.nan, "text": "é\n\udc80", "list": (1, math.inf)})
    assert line.isascii() and "\n" not in line
    assert json.loads(line) == {"loss": None, "text": "é\n\udc80", "list": [1, None]}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        report.write_json(path, {"x": object()})

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.system.os, "fsync", full_disk)
    with pytest.raises(OutputError, match=r"run\.json: cannot be written: No space left on device") as caught:
        report.write_json(path, {"x": 1})
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"] and path.read_text() == "old"


class Loads(HTMLParser):
    """Collects everything in a page that could make a browser fetch something, and its visible text."""

    FETCHING = ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background")

    def __init__(self, text):
        super().__init__()
        self.loads, self.tags, self.text = [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [value for name, value in attrs if name in self.FETCHING and not value.startswith("#")]

    def handle_data(self, data):
        self.text += data + " "


def write_page(path, result, steps):
    report.write_html(path, result, steps)
    return path.read_text(encoding="utf-8")


def test_page_loads_nothing_and_holds_everything(tmp_path):
    steps = make_steps(56)
    sample = Sample("prompt one", "ref one", "before one", "after one")
    result = make_result(tmp_path, steps, samples=[sample], warnings=["mind this"])
    text = write_page(tmp_path / "report.html", result, steps)
    page = Loads(text)
    assert page.loads == [] and not page.tags & {"script", "link", "iframe", "img", "object", "embed", "base"}
    assert "@import" not in text and "@font-face" not in text
    assert not re.search(r"url\((?!#)", text)
    assert set(re.findall(r"https?://[^\s\"<]+", text)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }
    assert "default-src 'none'" in text  # and the browser would refuse to
    assert text.count("<svg") == 3 and "prefers-color-scheme: dark" in text and "#00000" not in text
    seen = " ".join(page.text.split())
    for figure in report.key_figures(result):
        assert f"{figure.value} {figure.note}".strip() in seen or (figure.value in seen and figure.note in seen)
    for part in ("mind this", "prompt one", "ref one", "before one", "after one", metrics.FLOPS_FORMULA, "2.13.0"):
        assert part in seen
    for part in ("Some CPU", "23.40", "this [chip] has no bf16", "patched layers 7"):
        assert part in seen
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_page_escapes_every_string(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    steps = make_steps(3)
    result = make_result(
        evil + "dir",
        steps,
        status="failed",
        name=evil + "name",
        error=evil + "error",
        warnings=[evil + "warning"],
        samples=[Sample(*(evil + part for part in ("prompt", "reference", "before", "after")))],
        settings=[Setting(evil + "setting", evil + "value", evil + "reason")],
        backend=Backend(*(evil + part for part in ("library", "attention", "packing")), 0, "off", "float32"),
        versions={evil + "package": evil + "version"},
        hardware={evil + "fact": {evil + "key": [evil + "item"]}},
    )
    text = write_page(tmp_path / "report.html", result, steps)
    assert "<img" not in text
    words = (
        "name dir error warning prompt reference before after setting value reason library package version fact item"
    )
    for word in words.split():
        assert html.escape(evil) + word in text, word


@pytest.mark.parametrize("count", [0, 1, 2, 5000])
def test_page_of_any_number_of_steps_with_losses_that_are_not_finite(tmp_path, count):
    steps = make_steps(count)
    if count > 1:
        steps[count // 2 - 1] = dataclasses.replace(steps[count // 2 - 1], loss=math.inf)
        steps[count // 2] = dataclasses.replace(steps[count // 2], loss=-math.inf)
        steps[-1] = dataclasses.replace(steps[-1], loss=math.nan, tokens_per_s=0.0)
    text = write_page(tmp_path / "report.html", make_result(tmp_path, steps), steps)
    assert ("No step finished" in text) == (count == 0)
    assert text.count("<svg") == (3 if count else 0)
    assert ("one of every 5 is drawn" in text) == (count == 5000)
    assert len(text) < 400_000


def test_the_smoothed_loss_is_made_for_the_drawn_points_only(monkeypatch):
    drawn, means = [], []
    fmean = plots.statistics.fmean
    monkeypatch.setattr(plots, "line_plot", lambda x, lines, **options: drawn.append((x, lines)) or "")
    monkeypatch.setattr(plots.statistics, "fmean", lambda values: means.append(len(values)) or fmean(values))
    steps = make_steps(5000)
    plots.of_run(steps)
    x, (each, smooth) = drawn[0]
    window = 5000 // 15
    assert len(means) == len(smooth) == len(each) == len(x) == plots.MAX_POINTS
    for at in (0, 1, 500, 999):
        last = steps[max(0, x[at] - window) : x[at]]
        assert each[at] == steps[x[at] - 1].loss and smooth[at] == fmean(step.loss for step in last)


def test_a_single_step_is_a_visible_point():
    with_marker = plots.of_run(make_steps(1))[0][2]
    assert "<use" in with_marker and "var(--accent)" in with_marker


def test_same_run_same_page(tmp_path):
    steps = make_steps(30)
    first = write_page(tmp_path / "a.html", make_result(tmp_path, steps), steps)
    assert first == write_page(tmp_path / "b.html", make_result(tmp_path, steps), steps)


def test_a_card_of_a_name_that_is_no_unicode(tmp_path):
    from fasttune.config import ModelConfig
    from fasttune.tools import card, trained_model

    odd = "caf\udce9"  # a folder's name in another encoding, as Python gives it
    opened = trained_model.TrainedModel(f"/old/runs/{odd}", ModelConfig(name="builtin:tiny"), adapter=tmp_path / odd)
    card.write(tmp_path, card.of(opened))
    assert "# caf\\udce9\n" in (tmp_path / "README.md").read_text(encoding="utf-8")
