"""`fasttune eval RUN_A RUN_B …`: several runs asked the same problems → how they differ, with a paired test.

Each is evaluated by `fasttune eval` in a process of its own, one after the other: when a process has ended, the system
has taken back all of its memory, that of the GPU included, and nothing that Unsloth patched for one kind of model is
left for the next. That costs an import for each, half a minute. A folder with the files of an evaluation and no model
is taken as it is.
"""

import argparse
import json
import subprocess
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from fasttune import child_process, terminal
from fasttune.core.run_folder import EVAL_FILES
from fasttune.errors import FasttuneError, RunFailed
from fasttune.tools import evaluate, evaluated, paired, trained_model
from fasttune.tools.paired import Comparison

MOST = 26  # runs: the page letters them
SWITCHES = ("no_cache", "trust_remote_code")  # options that can only be given or not
OURS = {"command", "run", "interrupted", "overrides", "json", "debug", "model", "others", "out"}  # not passed on


def run(options: argparse.Namespace) -> tuple[Comparison, Path]:
    """Evaluate all, and return the comparison and the folder to write it into. Raises FasttuneError in one line.

    One that fails does not keep the others from being evaluated.
    """
    planned = plan(options)
    folder = evaluate.writable(Path(options.out or f"runs/compare-{datetime.now():%Y%m%d-%H%M%S}"))
    done, failed, reporter = dict[str, Path](), dict[str, int](), terminal.Reporter()
    for number, (name, (given, place)) in enumerate(planned.items(), 1):
        if place is None:
            reporter.note(f"run {number} of {len(planned)}: {name}")
        found = place or in_a_process(given, options)
        if isinstance(found, Path):
            done[name] = found
        else:
            failed[name] = found
            if found < 0:  # it could not say anything itself
                reporter.warn(f"{name}: its process was ended by signal {-found}")
    if failed:
        for name, place in done.items():
            reporter.note(f"kept: {name} in {place}")
        raise (FasttuneError if set(failed.values()) == {2} else RunFailed)(
            f"eval: no comparison, as {', '.join(failed)} failed (see above); {', '.join(done) or 'none'} evaluated "
            "and kept; fix it and give the same command, which takes kept answers, or leave it out"
        )
    return paired.compare([evaluated.read(name, done[name]) for name in planned]), folder


def plan(options: argparse.Namespace) -> dict[str, tuple[str, Path | None]]:
    """Name → (what was given, its folder where it is evaluated already). Raises FasttuneError before any is loaded."""
    given = [options.model, *options.others]
    if len(given) > MOST:
        raise FasttuneError(f"eval: {len(given)} runs; at most {MOST} can be compared at once")
    ready, asked, places = list[Path | None](), dict[str, Any](), dict[str, str]()
    for each in given:
        folder = Path(each).expanduser()
        ready.append(folder if holds_scores(folder) else None)
        if ready[-1] is None:
            trained = trained_model.open_run(each, options.trust_remote_code)
            asked[each] = evaluate.choose(options.tasks, options.data, trained)[:2]
            folder = trained.run or Path(trained.weights)
        place = str(folder.resolve() if folder.is_dir() else folder)
        if place in places:
            raise FasttuneError(f"eval: {each} is the same as {places[place]}; name each run once")
        places[place] = each
    _refuse(options, asked)
    return dict(zip(distinct(list(places)), zip(given, ready, strict=True), strict=True))


def _refuse(options: argparse.Namespace, asked: dict[str, tuple[list[str], str | None]]) -> None:
    """asked: of each run that is to be evaluated its tasks and the source of their rows."""
    for each, mine in asked.items():
        first, other = next(iter(asked.items()))
        if mine != other:
            each_its_own = "; ".join(f"{name}: {', '.join(t)} on {data}" for name, (t, data) in asked.items())
            raise FasttuneError(f"eval: {first} and {each} would be asked other problems ({each_its_own}); give --data")
    if not asked and (useless := flags(options)):
        raise FasttuneError(f"eval: {useless[0]} would be ignored: all of these are evaluated already")


def holds_scores(folder: Path) -> bool:
    """Whether it holds what an evaluation wrote, and nothing that could be evaluated again."""
    models = ("config.yaml", "config.json", trained_model.SETTINGS)
    return (folder / EVAL_FILES[0]).is_file() and not any((folder / name).exists() for name in models)


def distinct(places: list[str]) -> list[str]:
    """The last part of each path, or as many of its last parts as tell it from the others. No two paths are alike."""
    parts = [Path(place).parts for place in places]
    depths = [1] * len(places)
    while True:
        names = ["/".join(each[-depth:]) for each, depth in zip(parts, depths, strict=True)]
        alike = {name for name, count in Counter(names).items() if count > 1}
        if not alike:
            return names
        depths = [depth + (name in alike) for name, depth in zip(names, depths, strict=True)]


def in_a_process(name: str, options: argparse.Namespace) -> Path | int:
    """Evaluate one run: the folder of its scores, or the exit code. What it says goes to stderr as it is said."""
    debug = ["--debug"] if options.debug else []
    command = child_process.command("fasttune.cli", "eval", name, *flags(options), *debug, "--json")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=child_process.environment())
    return done.returncode or Path(json.loads(done.stdout.splitlines()[-1])["output_dir"])


def flags(options: argparse.Namespace) -> list[str]:
    """The options that are for each evaluation, whichever there are, as they stand on a command line."""
    given = []
    for name, value in vars(options).items():
        if name in OURS or value is None or (value is False and name in SWITCHES):
            continue
        given.append(f"--{'no-' if value is False else ''}{name.replace('_', '-')}")
        given += [] if isinstance(value, bool) else [str(value)]
    return given
