"""What a run leaves for people and programs: run.json and report.html."""

import dataclasses
import html
import json
import math
import re
from html.parser import HTMLParser

import pytest

from fasttune import metrics, report
from fasttune.errors import OutputError
from fasttune.metrics import Backend, RunResult, Sample, Setting, StepMetrics

SETTINGS = [Setting("model", "some/model"), Setting("dtype", "float32", "this [chip] has no bf16")]


def make_steps(count):
    return [StepMetrics(i, 2.0 / i, 1e-3, 1.0, 1000, 1000, 400, 100, 0.5, 2000.0, 3.5) for i in range(1, count + 1)]


def make_result(output_dir, steps, **changes):
    result = RunResult(
        status="completed",
        name="quickstart",
        output_dir=str(output_dir),
        steps=len(steps),
        first_loss=steps[0].loss if steps else None,
        last_loss=steps[-1].loss if steps else None,
        tokens=1000 * len(steps),
        computed_tokens=1000 * len(steps),
        loss_tokens=400 * len(steps),
        padding_fraction=0.0909,
        tokens_per_s=metrics.median_rate(steps),
        computed_tokens_per_s=metrics.median_rate(steps, "computed_tokens"),
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


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "$0.00"), (0.00003, "under $0.0001"), (0.0003, "$0.0003"), (0.25, "$0.25"), (1234.5, "$1,234.50")],
)
def test_dollars_stay_readable(amount, text):
    assert report.usd(amount) == text


def test_a_share_of_few_problems_stands_with_its_interval(tmp_path):
    match = metrics.ExactMatch(16, before=0.0, after=0.5)
    figures = {figure.label: figure for figure in report.key_figures(make_result(tmp_path, [], exact_match=match))}
    assert figures["exact match"].value == "0.0 % → 50.0 %"
    assert figures["exact match"].note.endswith("(95 %: 0 to 19 → 28 to 72)")
    assert report.interval(0.023, 0.0414) == "2.3 to 4.1"


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
    assert text.count("<svg") == 6 and "prefers-color-scheme: dark" in text and "#00000" not in text
    seen = " ".join(page.text.split())
    for figure in report.key_figures(result):
        assert f"{figure.value} {figure.note}".strip() in seen or (figure.value in seen and figure.note in seen)
    for part in ("mind this", "prompt one", "ref one", "before one", "after one", metrics.FLOPS_FORMULA, "2.13.0"):
        assert part in seen
    for part in ("Some CPU", "23.40", "this [chip] has no bf16", "patched layers 7"):
        assert part in seen
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_pictures_say_their_values_to_those_who_do_not_see_them(tmp_path):
    steps = make_steps(4)
    steps[1] = dataclasses.replace(steps[1], grad_norm=7.5, learning_rate=2e-4)
    steps[2] = dataclasses.replace(steps[2], grad_norm=None, loss=math.inf)
    text = write_page(tmp_path / "report.html", make_result(tmp_path, steps), steps)
    over = "over the optimizer steps"
    for said in (
        f"Loss {over}: 2 at step 1, 0.5 at step 4; lowest 0.5 at step 4, highest 2 at step 1",
        f"Learning rate {over}: 0.001 at step 1, 0.001 at step 4; lowest 0.0002 at step 2, highest 0.001 at step 1",
        f"Gradient norm {over}: 1 at step 1, 1 at step 4; lowest 1 at step 1, highest 7.5 at step 2",
        f"Memory {over}: 3.5 GiB at step 1, 3.5 GiB at step 4; lowest 3.5 GiB at step 1, highest 3.5 GiB at step 1",
    ):
        assert f'<figure role="img" aria-label="{said}">' in text, said
    none = [dataclasses.replace(step, grad_norm=None) for step in steps]
    assert 'aria-label="Gradient norm: no value that is finite"' in write_page(
        tmp_path / "report.html", make_result(tmp_path, none), none
    )


def test_the_page_names_the_next_commands(tmp_path):
    (tmp_path / "model").mkdir()
    text = write_page(tmp_path / "report.html", make_result(tmp_path, []), [])
    for command in (f"fasttune generate {tmp_path} --chat", f"vllm serve {tmp_path}/model"):
        assert f"<code>{command}</code>" in text


def test_facts_of_a_machine_have_their_units():
    told = report.facts({"memory_gib": 23.4, "gpus": [{"name": "X", "power_limit_w": 700.0}], "disk_free_gib": None})
    assert told == [("memory", "23.40 GiB"), ("gpus", "name X, power limit 700.00 W"), ("disk free", "–")]


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
    assert text.count("<svg") == (6 if count else 0)
    assert ("one of every 5 is drawn" in text) == (count == 5000)
    assert len(text) < 400_000


def test_a_card_of_a_name_that_is_no_unicode(tmp_path):
    from fasttune.settings import ModelConfig
    from fasttune.tools import card, trained_model

    odd = "caf\udce9"  # a folder's name in another encoding, as Python gives it
    opened = trained_model.TrainedModel(f"/old/runs/{odd}", ModelConfig(name="builtin:tiny"), adapter=tmp_path / odd)
    card.write(tmp_path, card.of(opened))
    assert "# caf\\udce9\n" in (tmp_path / "README.md").read_text(encoding="utf-8")
