"""How a benchmark is shown: bench.json, bench.html, bench.png, the quote and the page on the terminal.

`make_repeat`, `make_arm` and `make_bench` are for other files too.
"""

import dataclasses
import html
import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fasttune import metrics
from fasttune.bench import files, page, run
from fasttune.bench.stats import Arm, Bench, Limit, Repeat
from fasttune.hardware import Gpu, Hardware
from fasttune.metrics import Backend

CPU = Hardware("linux", "x86_64", "2.36", "3.11.2", "Some CPU", 2, 23.4, 100.0)
H100 = dataclasses.replace(CPU, gpus=(Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79.6),), driver="580.1")
RAN = Backend("transformers", "aten::sdpa", "padded", 28, "none", "float32 trained, float32 frozen, no autocast")


def make_repeat(speed: float = 100.0, **changes: Any) -> Repeat:
    """A slow first step, then three of 100 tokens at `speed`."""
    repeat = Repeat(
        tokens=[100] * 4,
        computed_tokens=[100] * 4,
        loss_tokens=[40] * 4,
        padding_tokens=[25] * 4,
        seconds=[100.0, *[100 / speed] * 3],
        losses=[2.0, 1.5, 1.25, 1.0],
        rows_digest="same",
        peak_memory_gib=3.25,
        seconds_to_first_step=12.5,
        flops_per_token=1e9,
        backend=RAN,
    )
    return dataclasses.replace(repeat, **changes)


def make_arm(name: str, *speeds: float, failure: str | None = None, **changes: Any) -> Arm:
    return Arm(name, f"what {name} is", [make_repeat(speed, **changes) for speed in speeds], failure)


def make_bench(*arms: Arm, machine: Hardware = CPU, **changes: Any) -> Bench:
    fast = make_arm("fasttune", 198, 199, 200, 201, 202, losses=[2.0, 1.5, 1.2502, 1.0])
    plain = make_arm("vanilla", 98, 99, 100, 101, 102)
    bench = Bench(
        name="gsm8k",
        command="fasttune bench c.yaml",
        model="some/model-135M",
        method="LoRA",
        dtype="float32",
        steps=4,
        batch_rows=8,
        max_length=1024,
        job_tokens=720_000,
        arms=list(arms) or [fast, plain],
        limit=Limit(0.4, 1e9, 400.0, metrics.FLOPS_FORMULA, {"64 x 576 x 576": 0.4}),
        usd_per_hour=None,
        hardware=dataclasses.asdict(machine),
        versions={"torch": "2.13.0"},
        git="abc1234",
        date="2026-11-20",
    )
    return dataclasses.replace(bench, **changes)


def shown(bench: Bench, width: int = 120, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    page.show(bench, Path("runs/bench"), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def html_of(bench: Bench, folder: Path) -> str:
    files.write(bench, folder)
    return (folder / "bench.html").read_text(encoding="utf-8")


# the quote


def test_quote_with_all_its_conditions() -> None:
    assert page.quote(make_bench(usd_per_hour=0.36)) == (
        "fasttune trains some/model-135M (LoRA, float32, max length 1,024, 8 rows a step) at 200 tokens/s on Some CPU "
        "(2 cores, no GPU), 2.00× plain Hugging Face (95 % interval 1.96 to 2.04, 5 repeats), 50.0 % of the measured "
        "matmul limit, $0.50 per million tokens at $0.36 an hour; losses agree within 0.016 %"
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"arms": [make_arm("fasttune", *[9.0] * 5)]}, "vanilla was not measured"),
        (
            {"arms": [make_arm("fasttune", failure="no [memory]"), make_arm("vanilla", *[9.0] * 5)]},
            "fasttune failed: no [memory]",
        ),
        (
            {
                "arms": [make_arm("fasttune", *[9.0] * 5), make_arm("vanilla", 9, 9)],
                "objections": ["2 repeats, fewer than 5", "busy"],
            },
            "2 repeats, fewer than 5; busy",
        ),
        (
            {
                "arms": [
                    make_arm("fasttune", *[9.0] * 5),
                    make_arm("vanilla", *[8.0] * 5),
                    make_arm("hf-tuned", *[8.0] * 5, rows_digest="x"),
                ]
            },
            "INVALID: hf-tuned against vanilla: they saw different rows; "
            "INVALID: fasttune against hf-tuned: they saw different rows",
        ),
    ],
)
def test_quote_makes_no_claim(changes: dict[str, Any], why: str) -> None:
    assert page.quote(make_bench(**changes)) == f"not a claim: {why}"


# bench.json


def test_json_holds_the_contract(tmp_path: Path) -> None:
    bench = make_bench(machine=H100, dtype="bfloat16", usd_per_hour=2.5)
    files.write(bench, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.html", "bench.png"}
    data = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert set(data) >= {"arms", "comparisons", "limit", "usd_per_hour", "hardware", "versions", "valid", "objections"}
    arm = data["arms"][0]
    for name in ("tokens_per_s", "loss_tokens_per_s", "step_s", "peak_memory_gib", "seconds_to_first_step"):
        assert set(arm[name]) == {"values", "median", "min", "max"} and len(arm[name]["values"]) == 5
    assert arm["tokens_per_s"]["median"] == pytest.approx(200)
    assert arm["losses"] == [2.0, 1.5, 1.2502, 1.0] and arm["backend"] == dataclasses.asdict(RAN)
    assert arm["share_of_limit"] == pytest.approx(0.5) and arm["mfu"] == pytest.approx(200 * 1e9 / 989e12)
    assert arm["usd_per_million_tokens"] == pytest.approx(2.5 / 3600 / 200 * 1e6)
    assert set(data["comparisons"][0]) >= {"ratio", "low", "high", "largest_loss_difference", "tolerance", "invalid"}
    assert set(data["limit"]) == {"tflops", "flops_per_token", "tokens_per_s", "formula", "shapes"}


@pytest.mark.parametrize(
    ("machine", "dtype", "ran", "known"),
    [
        (H100, "bfloat16", "float32 trained, bfloat16 frozen, bf16 autocast", True),
        (H100, "bfloat16", "float32 trained, bfloat16/uint8 frozen, bf16 autocast", False),
        (H100, "float32", "float32 trained, float32 frozen, no autocast", False),
        (dataclasses.replace(H100, gpus=(Gpu("New X1", (12, 0), 80.0),)), "bfloat16", "bfloat16 trained", False),
    ],
)
def test_mfu_only_for_bf16_on_a_known_chip(machine: Hardware, dtype: str, ran: str, known: bool) -> None:
    arm = make_arm("fasttune", 200, backend=dataclasses.replace(RAN, dtype=ran))
    assert (make_bench(arm, machine=machine, dtype=dtype).mfu(arm) is not None) == known


def test_what_is_not_counted_has_no_share_and_says_why(tmp_path: Path) -> None:
    arms = [make_arm(name, *[100.0] * 5, flops_per_token=None) for name in ("fasttune", "vanilla")]
    bench = make_bench(*arms, machine=H100, dtype="bfloat16", limit=None)
    plain = bench.as_dict()["arms"][0]
    assert (plain["mfu"], plain["share_of_limit"]) == (None, None)
    assert "of limit" not in page.table(bench)
    assert all("mixture of experts are not counted" in text for text in (shown(bench, 200), html_of(bench, tmp_path)))
    assert make_bench().limit_unknown is None and bench.limit_unknown
    measured = object.__new__(run.Measurements)
    measured.lines = [{"arm": arm.name, "repeat": 0, "flops_per_token": None} for arm in arms]
    measured.lines.append({"arm": "limit", "repeat": 0, "tflops": 1.0})
    assert measured.limit(1) is None


def test_a_limit_below_an_arm_is_none(tmp_path: Path) -> None:
    """Of 202 tokens/s at 1 GFLOP a token, and 0.15 TFLOP/s."""
    low = Limit(0.15, 1e9, 150.0, metrics.FLOPS_FORMULA, {"64 x 576 x 576": 0.15})
    bench = make_bench(limit=low)
    assert bench.as_dict()["arms"][1]["share_of_limit"] is None and bench.as_dict()["limit"]["tflops"] == 0.15
    for text in (shown(bench, 200), html_of(bench, tmp_path)):
        assert "more than the 0.15 TFLOP/s that were measured of matmuls alone: no limit is shown" in text
        assert "measured matmul limit" not in text and "of limit" not in text


# bench.html


def test_page_loads_nothing_and_holds_everything(tmp_path: Path) -> None:
    broken = make_arm("unsloth-notebook", failure="out of memory")
    fine = make_bench()
    bench = dataclasses.replace(fine, arms=[*fine.arms, broken], usd_per_hour=2.5)
    text = html_of(bench, tmp_path)
    assert not re.search(r"<(script|link|iframe|img|object|embed|base)\b|@import|@font-face|url\((?!#)", text)
    assert set(re.findall(r"https?://[^\s\"<]+", text)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "#00000" not in text
    seen = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())
    for part in (
        page.quote(bench),
        "failed out of memory",
        metrics.FLOPS_FORMULA,
        "what vanilla is",
        "64 x 576 x 576: 0.4 TFLOP/s",
        "measured matmul limit 400",
        "losses agree within 0.016 %",
        "1 h 00 min $2.50",
        "abc1234",
        "aten::sdpa",
        "2.13.0",
    ):
        assert part in seen, part
    svg = text[text.index("<svg") : text.index("</svg>")]
    for part in ("fasttune   200 tokens/s   2.00×", "vanilla   100 tokens/s", "failed: out of memory", "var(--accent)"):
        assert part in svg, part
    spoken = (
        "Speed, median of the repeats: fasttune 200 tokens/s 2.00× (198 to 202); vanilla 100 tokens/s (98.0 to 102)"
    )
    assert f'aria-label="{spoken}; unsloth-notebook failed: out of memory; measured matmul limit 400"' in text


def test_page_escapes_every_name(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    fields = {name: evil + name for name in ("name", "command", "model", "git", "date")}
    backend = dataclasses.replace(RAN, library=evil + "library", attention=evil + "attention", packing=evil + "packing")
    bench = make_bench(
        make_arm(evil + "arm", 9, backend=backend),
        make_arm("vanilla", failure=evil + "failure"),
        objections=[evil + "objection"],
        versions={evil + "package": evil + "version"},
        **fields,
    )
    text = html_of(bench, tmp_path)
    assert "<img" not in text
    for word in [*fields, *"library attention packing arm failure objection package version".split()]:
        assert html.escape(evil) + word in text, word


@pytest.mark.parametrize(
    "bench",
    [
        make_bench(make_arm("fasttune", failure="x"), make_arm("vanilla", failure="y"), limit=None),
        make_bench(make_arm("fasttune", 9, failure="stopped later"), limit=None),
        make_bench(make_arm("fasttune", 9, losses=[1.0] * 3 + [float("nan")]), make_arm("vanilla", 9)),
        make_bench(limit=Limit(40.0, 1e9, 40_000.0, metrics.FLOPS_FORMULA, {})),
    ],
    ids=["nothing ran", "one repeat", "not finite", "limit far away"],
)
def test_all_files_and_the_page_of_any_outcome(bench: Bench, tmp_path: Path) -> None:
    text = html_of(bench, tmp_path) + shown(bench)
    assert "nan" not in re.sub(r"[Ff]inance", "", text)
    for arm in bench.arms:
        assert (arm.failure or arm.name) in text
    json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))


# bench.png


def test_picture_has_the_size_of_a_preview(tmp_path: Path) -> None:
    files.write(make_bench(), tmp_path)
    data = (tmp_path / "bench.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (1200, 630)


def test_a_limit_far_away_leaves_the_bars_readable() -> None:
    svgs = [files.picture(make_bench(limit=Limit(1.0, 1e9, limit, "", {})))[1] for limit in (400.0, 40_000.0)]
    assert "dashed: measured matmul limit 400 tokens/s<" in svgs[0] and "(outside)" not in svgs[0]
    assert "matmul limit 40,000 tokens/s (outside) →" in svgs[1] and ">200<" in svgs[1]  # the axis ends at the bars


# the terminal


def flat(text: str) -> str:
    return " ".join(text.split())


def test_a_narrow_terminal_cuts_no_figure() -> None:
    bench = dataclasses.replace(make_bench(), usd_per_hour=2.5)
    text = shown(bench, 60, no_color=True)
    assert all(len(line) <= 60 for line in text.splitlines()) and "…" not in text
    for heading, column in page.table(bench).items():
        assert heading.rpartition(" ")[2] in text
        assert all(cell.value in text and cell.note in text for cell in column)


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_shows_every_arm_and_every_figure(width: int) -> None:
    fine = make_bench()
    bench = dataclasses.replace(
        fine, arms=[*fine.arms, make_arm("unsloth-notebook", failure="out of [memory]\x1b[2J")], usd_per_hour=2.5
    )
    text = shown(bench, width)
    assert all(len(line) <= width for line in text.splitlines())
    for part in (
        r"fasttune +200 +2\.00 +80\.0 +0\.5 +20\.0 % +3\.25",
        r"198–202 +1\.96–2\.04",
        r"vanilla +100 +1 +40\.0 +1 +20\.0 %",
        r"12\.5 +50\.0 % +\$3\.47 +1 h 00 min",
        r"unsloth-notebook +failed",
    ):
        assert re.search(part, text), part
    for part in (
        "unsloth-notebook failed: out of [memory]�[2J",
        "28 layers patched",
        "losses agree within 0.016 % over 4 steps – tolerance 0.1 %",
        page.quote(bench),
        "runs/bench/bench.html",
    ):
        assert part in flat(text), part
    assert "MFU" not in text  # there is none on a CPU


def test_terminal_says_invalid_in_red_and_shows_no_ratio() -> None:
    bench = make_bench(make_arm("fasttune", *[9.0] * 5, rows_digest="x"), make_arm("vanilla", *[3.0] * 5))
    text = shown(bench, color_system="standard", force_terminal=True)
    assert "\x1b[1;31mINVALID \x1b[0mfasttune against vanilla: they saw different rows" in text
    assert text.count("INVALID") == 3 and "3.00" not in text  # table, parity, quote


def test_terminal_shows_objections_and_a_failure_after_some_repeats() -> None:
    arms = [make_arm("fasttune", *[9.0] * 5), make_arm("vanilla", 9, 9, 9, failure="killed")]
    text = flat(shown(make_bench(*arms, objections=["other programs ran beside it"])))
    assert "vanilla failed: killed" in text and text.count("other programs ran beside it") == 1
    assert "not a claim: 3 repeats, fewer than 5; other programs ran beside it" in text
