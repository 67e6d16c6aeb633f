#!/usr/bin/env python3
"""results/ → the tables in benchmarks/README.md and docs/recipes.md, the sentences in README.md, tools/rates.json:

    python benchmarks/render.py [--check]

Text between the markers is written here and nowhere else. --check writes nothing; it exits 1 if the rows say otherwise.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import precision
import recipes

from fasttune.report import rate as number

ROOT = Path(__file__).resolve().parent.parent
# What README.md quotes: the newest row of each, and what its rows are.
CPU_FILES = {
    "smollm2-135m-gsm8k.jsonl": "GSM8K, 4 rows a step",
    "smollm2-135m-shared-prompt.jsonl": "the same behind an 885-token prompt",
    "smollm2-135m-shared-prompt-16.jsonl": "the same, 16 rows a step",
    "smollm2-135m-eight-answers.jsonl": "8 answers to each question, shuffled, 16 rows a step",
    "smollm2-135m-eight-answers-grouped.jsonl": "the same with train.group_by_prompt",
}
GPU_FILE = "lora-r64-2048-gsm8k.jsonl"
KEY_VERSIONS = ("torch", "transformers", "peft", "trl", "unsloth")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    rows = read(options.root / "benchmarks" / "results")
    stale = []
    for path, marker, text in (
        (options.root / "benchmarks" / "README.md", "results", tables(rows)),
        (options.root / "README.md", "measured", sentences(rows)),
        (options.root / "docs" / "recipes.md", "recipes", recipes.page(options.root) + precision.page(options.root)),
        (options.root / "fasttune" / "tools" / "rates.json", None, json.dumps(rates(rows), indent=2) + "\n"),
    ):
        old = path.read_text(encoding="utf-8")
        new = text if marker is None else between(old, marker, text, path)
        if new != old:
            stale.append(path.relative_to(options.root).as_posix())
            if not options.check:
                path.write_text(new, encoding="utf-8")
    if options.check and stale:
        print(f"{', '.join(stale)}: not what results/ says; run python benchmarks/render.py", file=sys.stderr)
        return 1
    print(f"{'written' if stale else 'up to date'}: {sum(map(len, rows.values()))} rows", file=sys.stderr)
    return 0


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """File name → its rows, oldest first."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        found[path.name] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if unknown := [row for row in found[path.name] if row.get("benchmark") not in SHOWN]:
            raise SystemExit(f"render: {path.name}: no table is known for rows of {unknown[0].get('benchmark')}")
    return found


def between(page: str, marker: str, text: str, path: Path) -> str:
    """The page with other text between `<!-- marker -->` and `<!-- /marker -->`."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(end) < page.index(begin):
        raise SystemExit(f"render: {path.name} must hold {begin} … {end} once")
    return page[: page.index(begin) + len(begin)] + f"\n{text}\n" + page[page.index(end) :]


def tables(rows: dict[str, list[dict[str, Any]]]) -> str:
    """All measurements, the newest of each file first."""
    if not rows:
        return "Nothing has been measured yet."
    parts = []
    for name, measured in rows.items():
        parts.append(f"### {name.removesuffix('.jsonl')}")
        newest, *older = [SHOWN[row["benchmark"]](row) for row in reversed(measured)]
        if measured[-1]["benchmark"] == "forecast_error":  # of the older ones only what they say as a whole
            older = [text.partition("\n\n")[0] for text in older]
        parts += [newest, *older]
    return "\n\n".join(parts)


def measurement(row: dict[str, Any]) -> str:
    """A row as its conditions and a table with a line for every arm."""
    versions = ", ".join(f"{name} {row['versions'][name]}" for name in KEY_VERSIONS if name in row["versions"])
    over = row.get("baseline", "vanilla")
    lines = [
        f"{row['date']}, revision `{row['git']}`, {machine(row['hardware'])}; {versions}  ",
        f"`{row['command']}`, {row['steps']} steps a repeat  ",
        f"{verdict(row)}",
        "",
        f"| arm | tokens/s, median (range) | over {over} (95 % interval) | of the limit | peak GiB | padding | ran |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join(lines + [f"| {' | '.join(arm_cells(row, arm))} |" for arm in row["arms"]])


def rate(row: dict[str, Any]) -> str:
    """A row of `prepare_rows.py rate`: the whole way from rows to tokens, over the tokenizer alone."""
    raw, whole = row["rows_per_s"]["raw"], row["rows_per_s"]["prepare"]
    where = f"{row['date']}, revision `{row['git']}`, {row['hardware']}: {row['rows']:,} rows, {len(raw)} repeats."
    alone = f"The tokenizer alone: {number(statistics.median(raw))} rows/s ({number(min(raw))} to {number(max(raw))})."
    way = f"{number(statistics.median(whole))} ({number(min(whole))} to {number(max(whole))})"
    return f"{where} {alone} From the file to the cache: {way}, **{row['prepare_over_raw']:.0%}** of it."


def scale(row: dict[str, Any]) -> str:
    """A row of `prepare_rows.py scale`: time and memory by number of rows."""
    lines = [
        f"{row['date']}, revision `{row['git']}`, {row['hardware']}",
        "",
        "| rows | MB | s | s from the cache | peak GiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for size in row["sizes"]:
        cells = [f"{size['rows']:,}", f"{size['bytes'] / 1e6:,.0f}", f"{size['seconds']:.1f}", f"{size['again_s']:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{size['peak_gib']:.2f}"]) + " |")
    return "\n".join(lines)


def forecast_error(row: dict[str, Any]) -> str:
    """A row of `forecast_error.py`: forecast peaks and times against measured ones."""
    head = [f"{row['date']}, revision `{row['git']}`, {row['hardware']}", error_of("memory", row["runs"], "gib")]
    timed = [run for run in row["runs"] if run.get("forecast_s")]
    head += [error_of("time of the whole command", timed, "s")] if timed else []
    lines = [
        ": ".join([head[0], "; ".join(head[1:])]) + ".",
        "",
        "| configuration | tokens at once | forecast GiB | measured GiB | error | forecast s | measured s | error | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in row["runs"]:
        cells = [run["what"], f"{run['tokens']:,}", f"{run['forecast_gib']:.2f}", f"{run['measured_gib']:.2f}"]
        cells += [f"{error(run, 'gib'):+.1%}"]
        seconds = (
            [f"{run['forecast_s']:.0f}", f"{run['measured_s']:.0f}", f"{error(run, 's'):+.0%}"] if run in timed else []
        )
        lines.append(
            "| " + " | ".join([*cells, *(seconds or [""] * 3), "" if run["fitted"] else "not seen before"]) + " |"
        )
    return "\n".join(lines)


def error_of(what: str, runs: list[dict[str, Any]], unit: str) -> str:
    """The errors of all runs in words, and of those that the constants were not chosen with."""
    errors = [error(run, unit) for run in runs]
    unseen = [abs(error(run, unit)) for run in runs if not run["fitted"]]
    told = f"{what} of {len(errors)} configurations, largest error **{max(map(abs, errors)):.0%}**"
    not_seen = f"{len(unseen)} of them not seen when the constants were chosen, largest {max(unseen, default=0):.0%}"
    return f"{told}, mean {statistics.mean(errors):+.0%} ({not_seen})"


def error(run: dict[str, Any], unit: str) -> float:
    return float(run[f"forecast_{unit}"] / run[f"measured_{unit}"] - 1)


def rates(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What `fasttune plan` counts on, by kind of machine.

    Of a GPU the FLOPs a second that fasttune's arm computed, the newest measurement of each job; of a CPU the share of
    its matmul rate in all runs of forecast_error.py that its constants may be chosen with.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, measured in rows.items():
        for row in measured:
            if rate := gpu_rate(row) or cpu_shares(row):
                job = rate["machine"], rate["dtype"], rate.get("method"), row.get("name")
                if "shares" in rate:
                    rate["shares"] = sorted(rate["shares"] + found.get(job, {"shares": []})["shares"])
                found[job] = rate | {"date": row["date"], "source": f"benchmarks/results/{name}"}
    return sorted(found.values(), key=lambda rate: rate["date"], reverse=True)


def gpu_rate(row: dict[str, Any]) -> dict[str, Any] | None:
    """Of a benchmark on a GPU, if nothing stands against it and nothing was recomputed, which would not be counted."""
    arm = next((arm for arm in row.get("arms", []) if arm["name"] == "fasttune" and arm["tokens_per_s"]), None)
    if arm is None or arm["share_of_limit"] is None or row["objections"] or not row["settings"]:
        return None
    if not row["hardware"]["gpus"] or arm["backend"]["gradient_checkpointing"] != "none":
        return None
    middle = arm["share_of_limit"] * row["limit"]["tflops"] / statistics.median(arm["tokens_per_s"])
    return {
        "machine": row["hardware"]["gpus"][0]["name"],
        "dtype": row["dtype"],
        "method": row["settings"]["train"].get("method", "lora"),
        "packed": arm["backend"]["packing"].startswith("packed"),
        "tflops": [round(middle * value, 4) for value in arm["tokens_per_s"]],
    }


def cpu_shares(row: dict[str, Any]) -> dict[str, Any] | None:
    """Of a row of `forecast_error.py`."""
    runs = [run for run in row.get("runs", []) if run["fitted"] and run.get("share") is not None]
    if not runs:
        return None
    where = {key: runs[0][key] for key in ("machine", "dtype")}
    return where | {"shares": [run["share"] for run in runs]}


SHOWN = {"forecast_error": forecast_error, "bench": measurement, "prepare_rows rate": rate, "prepare_rows scale": scale}


def arm_cells(row: dict[str, Any], arm: dict[str, Any]) -> list[str]:
    speeds = arm["tokens_per_s"]
    if not speeds:
        return [arm["name"], f"failed: {arm['failure']}".replace("|", "/"), "", "", "", "", ""]
    ratio = compared(row, arm["name"])
    share = arm["share_of_limit"]
    ran = arm["backend"]
    return [
        arm["name"],
        f"{speed(arm)} ({number(min(speeds))} to {number(max(speeds))}, {len(speeds)} repeats)",
        f"{ratio['ratio']:.2f}" + (f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if len(speeds) > 1 else "")
        if ratio
        else "",
        f"{share:.0%}" if share is not None else "",
        f"{statistics.median(arm['peak_memory_gib']):.1f}",
        f"{arm['padding_fraction']:.0%}",
        f"{ran['attention']}; {ran['packing']}; checkpointing {ran['gradient_checkpointing']}; {ran['dtype']}",
    ]


def verdict(row: dict[str, Any]) -> str:
    """What stands against the numbers, and how well the losses agree."""
    worst = max((c["largest_loss_difference"] for c in row["comparisons"]), default=None)
    parity = f"Losses agree within {worst:.1e}." if worst is not None else "One arm: no losses to compare."
    return f"**Not a claim**: {'; '.join(row['objections'])}. {parity}" if row["objections"] else parity


def sentences(rows: dict[str, list[dict[str, Any]]]) -> str:
    """README.md's measured numbers, with their conditions."""
    quoted = {file: rows[file][-1] for file in CPU_FILES if rows.get(file)}
    gpu = [sentence(rows[GPU_FILE][-1], GPU_FILE)] if rows.get(GPU_FILE) else []
    return "\n\n".join(by_job(quoted) + (gpu or ["No speed has been measured on a GPU yet."]))


def by_job(quoted: dict[str, dict[str, Any]]) -> list[str]:
    """A table with a line for each job, and below it what they have in common and what stands against them."""
    if not quoted:
        return []
    head = ["job", "fasttune", "vanilla", "hf-tuned", "over vanilla (95 % interval)", "of the limit"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for file, row in quoted.items():
        arms = {arm["name"]: arm for arm in row["arms"] if arm["tokens_per_s"]}
        cells = [speed(arms[name]) if name in arms else "" for name in head[1:4]]
        ratio, share = compared(row, "fasttune"), arms["fasttune"].get("share_of_limit")
        cells.append(f"**{ratio['ratio']:.2f}×** ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "")
        cells.append(f"{share:.0%}" if share is not None else "")
        lines.append(f"| [{CPU_FILES[file]}](benchmarks/results/{file}) | {' | '.join(cells)} |")
    under = (
        "Tokens/s without padding, each row's own however it is computed; medians. The limit: what the matmuls alone"
    )
    under += " would take. Each line is one benchmark; its command and conditions are in `benchmarks/README.md`."
    of_each = [f"{CPU_FILES[file]}: {conditions(row)}" for file, row in quoted.items()]
    return ["\n".join(lines), under + "\n- " + "\n- ".join(of_each)]


def speed(arm: dict[str, Any]) -> str:
    """Median tokens/s, and how many of them are computed where rows share some."""
    every, computed = (statistics.median(arm.get(f"{kind}tokens_per_s") or [0]) for kind in ("", "computed_"))
    return number(every) + (f" ({number(computed)} computed)" if 0 < computed < every else "")


def conditions(row: dict[str, Any]) -> str:
    repeats = max(len(arm["tokens_per_s"]) for arm in row["arms"])
    where = f"{row['model']} on {machine(row['hardware'])}, {repeats} repeats, {row['date']}"
    return f"{where}. {verdict(row)}"


def sentence(row: dict[str, Any], file: str) -> str:
    """One measurement in words: numbers, command, hardware, date, file."""
    arms = {arm["name"]: arm for arm in row["arms"] if arm["tokens_per_s"]}
    parts = [f"**{name}** {number(statistics.median(arm['tokens_per_s']))}" for name, arm in arms.items()]
    text = f"{row['model']} on {machine(row['hardware'])}, tokens/s without padding: {', '.join(parts)}"
    if ratio := compared(row, "fasttune"):
        repeats = len(arms["fasttune"]["tokens_per_s"])
        text += f"; fasttune is **{ratio['ratio']:.2f}×** plain Hugging Face"
        interval = f"95 % interval {ratio['low']:.2f} to {ratio['high']:.2f}, {repeats} repeats"
        text += f" ({interval if repeats > 1 else 'one repeat, so no interval'})"
    share = arms.get("fasttune", {}).get("share_of_limit")
    text += f" and runs at {share:.0%} of the measured matmul limit" if share is not None else ""
    source = f"`{row['command']}`, {row['date']}, [{file}](benchmarks/results/{file})"
    return f"{text}. {verdict(row)} {source}."


def compared(row: dict[str, Any], arm: str) -> dict[str, Any] | None:
    """An arm over plain Hugging Face, or over the fewest processes."""
    over = row.get("baseline", "vanilla")
    return next((c for c in row["comparisons"] if (c["arm"], c["over"]) == (arm, over)), None)


def machine(hardware: dict[str, Any]) -> str:
    if hardware["gpus"]:
        return f"{hardware['gpus'][0]['name']} (driver {hardware['driver']})"
    return f"{hardware['cpu_model']} ({hardware['cores']} cores, no GPU)"


if __name__ == "__main__":
    sys.exit(main())
