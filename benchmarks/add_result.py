#!/usr/bin/env python3
"""Append a finished benchmark to benchmarks/results/NAME.jsonl:  python benchmarks/add_result.py BENCH.json

BENCH.json is what `fasttune bench` wrote. From the GPU battery:  … results.jsonl --stage NAME [--revision REV]
where REV says which revision ran on a machine without git; it is taken only if its sources are those that ran.
Refuses what cannot be compared and what has no revision. Folders of the machine are cut from commands and names.
Then run benchmarks/render.py.
"""

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from battery import source_digest

from fasttune.bench.stats import BASELINE, NO_REVISION, SPREADS

RESULTS = Path(__file__).resolve().parent / "results"
JOB = ("name", "date", "model", "dtype", "steps", "batch_rows", "max_length")
ARM = ("name", "failure", "padding_fraction", "share_of_limit", "usd_per_million_tokens", "losses", "backend")
IDS = ("uuid", "card")  # of a GPU: those of one machine, which a result is to be without
MACHINE = ("os", "arch", "glibc", "python", "cpu_model", "cores", "memory_gib", "gpus", "driver")
# A folder of some machine: absolute, ~ or ../, but neither a URL nor a path inside the repository.
FOLDERS = re.compile(r"(?<![\w:/.])(?:~\w*|\.\.?)?(?:/[^\s/'\",;:()\[\]]+)+/?")


class Refused(Exception):
    """The result may not be added; the text says why."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--stage", help="of the battery's results.jsonl")
    parser.add_argument("--revision", help="what ran, where git could not say")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        bench = read(options.file, options.stage, options.revision)
        row = make_row(bench)
        path = append(row, options.results)
    except Refused as refused:
        print(f"add_result: {refused}", file=sys.stderr)
        return 2
    print(f"{path.name}: added; now run benchmarks/render.py")
    return 0


def read(path: Path, stage: str | None, revision: str | None) -> dict[str, Any]:
    """bench.json's content, with the command and config of its neighbours. Raises Refused."""
    try:
        text = path.read_text(encoding="utf-8")
        if stage is None:
            return {"settings": _settings(path.parent)} | json.loads(text)
        rows = [json.loads(line) for line in text.splitlines()]
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise Refused(f"{path}: no JSON document; a results.jsonl needs --stage") from error
    found = next((row for row in reversed(rows) if row["stage"] == stage and row["status"] == "ok"), None)
    if found is None or not isinstance(found.get("result"), dict):
        raise Refused(f"{path}: holds no finished benchmark {stage}")
    if found["dry_run"]:
        raise Refused(f"{path}: {stage} is a dry run")
    bench = found["result"] | {"command": found["command"], "settings": _settings(path.parent / stage)}
    if bench["git"] in ("", NO_REVISION) and revision:
        if digest_of(revision) != found["source"]:
            raise Refused(f"--revision {revision}: its sources are not those that ran")
        bench["git"] = revision
    return bench


def _settings(folder: Path) -> Any:
    """The resolved config, if the measurements lie beside the result."""
    path = folder / "measurements.jsonl"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        return json.loads(file.readline())["config"]


def digest_of(revision: str) -> str:
    """battery.source_digest of a revision of this repository."""
    command = ["git", "archive", "--format=tar", revision, "fasttune"]
    done = subprocess.run(command, capture_output=True, check=False, cwd=RESULTS.parent.parent)
    if done.returncode:
        raise Refused(f"--revision {revision}: git does not know it")
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
        return source_digest(Path(folder))


def make_row(bench: dict[str, Any]) -> dict[str, Any]:
    """One line of results/NAME.jsonl. Raises Refused."""
    missing = [key for key in ("arms", "comparisons", "hardware", "versions", "git", "valid", *JOB) if key not in bench]
    if missing:
        raise Refused(f"not a bench.json: it has no {', '.join(missing)}")
    if not bench["valid"]:
        reasons = {c["invalid"] for c in bench["comparisons"] if c["invalid"]}
        raise Refused(f"the benchmark is INVALID: {'; '.join(sorted(reasons))}")
    if bench["git"] in ("", NO_REVISION):
        raise Refused("no git revision: run it from a checkout (or give --revision with a battery's results.jsonl)")
    if not any(arm["tokens_per_s"]["values"] for arm in bench["arms"]):
        raise Refused("no arm was measured")
    arms = [{key: arm[key] for key in ARM} | {key: arm[key]["values"] for key in SPREADS} for arm in bench["arms"]]
    row = {"benchmark": "bench"} | {key: bench[key] for key in JOB}
    row |= {"git": bench["git"], "command": bench["command"], "settings": bench.get("settings")}
    machine = {key: bench["hardware"].get(key) for key in MACHINE}
    machine["gpus"] = [{key: gpu[key] for key in gpu if key not in IDS} for gpu in machine["gpus"]]
    row |= {"hardware": machine, "versions": bench["versions"]}
    if bench.get("baseline", BASELINE) != BASELINE:  # on several numbers of processes
        row["baseline"] = bench["baseline"]
        for arm, measured in zip(arms, bench["arms"], strict=True):
            arm |= {
                "efficiency": measured["efficiency"],
                "stragglers": [one["straggler"] for one in measured["repeats"]],
            }
    row |= {"arms": arms, "comparisons": bench["comparisons"], "limit": bench["limit"]}
    return portable(row | {"usd_per_hour": bench["usd_per_hour"], "objections": bench["objections"]})


def portable(value: Any) -> Any:
    """The same with every folder of a machine cut down to the last name."""
    if isinstance(value, dict):
        return {portable(key): portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    if isinstance(value, str):
        return FOLDERS.sub(lambda match: match[0].rstrip("/").rpartition("/")[2], value)
    return value


def append(row: dict[str, Any], results: Path) -> Path:
    """Add the row to its file, after those that are there. Raises Refused if it is there already."""
    results.mkdir(exist_ok=True)
    path = results / f"{row['name']}.jsonl"
    line = json.dumps(row, ensure_ascii=False) + "\n"
    if path.exists() and line in path.read_text(encoding="utf-8"):
        raise Refused(f"{path.name}: this measurement is there already")
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
    return path


if __name__ == "__main__":
    sys.exit(main())
