"""`fasttune eval`: a finished run or a model on tasks of EleutherAI's harness → scores, and every problem beside them.

Writes eval.json and eval_samples.jsonl (a line a problem: prompt, answer, reference, right or not).
"""

import argparse
import difflib
import importlib.metadata
import importlib.util
import math
import os
import sqlite3
import time
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from fasttune import hardware, report, system, terminal
from fasttune.core import pretrained
from fasttune.core.run_folder import EVAL_FILES
from fasttune.data import chat, sources
from fasttune.errors import FasttuneError, OutputError, RunFailed, in_one_line
from fasttune.system import library_log, take_over_loggers
from fasttune.tools import card, scores, tasks as own, trained_model
from fasttune.tools.card import Score
from fasttune.tools.tasks import benchmarks
from fasttune.tools.trained_model import TrainedModel

BATCH_ROWS_CPU, BATCH_ROWS_GPU = 16, 64
NEEDS = ("lm_eval", "sacrebleu")  # imported by the harness at its start
INSTALL = "bash scripts/setup_h100.sh (outside a checkout: pip install 'fasttune[eval]')"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Score RUN or MODEL, write the two files and return what eval.json holds. Raises FasttuneError in one line.

    `from_cache`: requests that this very model had answered before.
    """
    started, reporter = time.perf_counter(), terminal.Reporter()
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise FasttuneError(f"eval: {', '.join(missing)} is not installed; bring the environment up to date: {INSTALL}")
    trained = trained_model.open_run(options.model, options.trust_remote_code)
    names, data, why = choose(options.tasks, options.data, trained)
    folder = _folder(trained, options.out)
    reporter.note(f"tasks: {', '.join(names)}{f' on {data}' if data else ''} ({why})")
    reporter.note("importing unsloth and torch …")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars; read when tqdm is imported
    with library_log():
        from fasttune.tools import harness

        take_over_loggers()
        machine = hardware.as_torch_sees(hardware.detect(folder))
        templated, because = asked_in_turns(options.chat_template, names, trained)
        loaded = harness.load_tasks(names, data, *trained.reading(data or ""))  # bad rows fail before weights are read
        reporter.note(f"prompts {'in the chat template' if templated else 'as they are, no chat template'}: {because}")
        reporter.note(f"loading {trained.weights} …")
        dtype = trained_model.dtype_for(trained)
        model, tokenizer = trained_model.load(trained, dtype)
        changes = chat.complete(tokenizer) if templated else []
        for text in [*trained.warnings, *(f"chat template: {what}: {reason}" for what, reason in changes)]:
            reporter.warn(text)
        rows = options.batch_rows or (BATCH_ROWS_GPU if model.device.type == "cuda" else BATCH_ROWS_CPU)
        fix = f"remove {system.cache_root() / 'answers'}, or give --no-cache"
        unusable = in_one_line(OutputError, "the kept answers cannot be used", fix, (sqlite3.Error,))
        try:
            with unusable, closing(harness.AnswerCache(model, tokenizer, keep=not options.no_cache)) as known:
                asked = harness.Harness(model, tokenizer, rows, known, reporter.progress)
                raw = harness.run(asked, loaded, options.limit, templated)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            raise RunFailed(f"out of memory with {rows} rows at once; lower --batch-rows") from error
        finally:
            reporter.stop()
    for text in (twice := scores.same_options(raw)):
        reporter.warn(text)
    result = {
        "model": options.model,
        "weights": trained.weights,
        "output_dir": str(folder),
        "tasks": names,
        "data": data,
        "limit": options.limit,
        "chat_template": templated,
        "chat_template_reason": because,
        "scores": scores.scores(raw),
        "batch_rows": rows,
        "dtype": dtype,
        "requests": asked.from_cache + asked.computed,
        "from_cache": asked.from_cache,
        "seconds": time.perf_counter() - started,
        "date": datetime.now().isoformat(timespec="seconds"),
        "hardware": hardware.line(machine),
        "versions": system.versions() | {"lm_eval": importlib.metadata.version("lm_eval")},
        "warnings": [*trained.warnings, *twice],
    }
    with in_one_line(OutputError, f"--out {folder}: cannot be made", "name another folder", (OSError,)):
        folder.mkdir(parents=True, exist_ok=True)
    problems = [scores.problem(task, sample) for task, found in raw["samples"].items() for sample in found]
    lines = "".join(report.to_json_line(line) + "\n" for line in problems)
    report.write_bytes(folder / EVAL_FILES[1], lines.encode())
    report.write_json(folder / EVAL_FILES[0], result)
    if trained.run and folder.resolve() == trained.run.resolve():
        card.of_run(trained.run, trained.result)
    return result


def choose(tasks: str | None, data: str | None, trained: TrainedModel) -> tuple[list[str], str | None, str]:
    """(task names, source of their rows, why these). Raises FasttuneError for a combination that would be ignored."""
    settings = trained.config.data if trained.config else None
    held_out, share = (settings.eval, settings.eval_share) if settings else (None, 0)
    said = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    names = list(dict.fromkeys(task for name in said for task in benchmarks.GROUPS.get(name, [name])))
    if from_folder := [name for name in names if name in benchmarks.NAMES]:
        return _with_folder(names, from_folder, data)
    if data is not None and Path(data).is_dir():
        near = difflib.get_close_matches((names or [""])[0], benchmarks.NAMES, n=1) or benchmarks.GROUPS
        task = f"which --tasks {names[0]} does not read" if names else "which no task reads by itself"
        raise FasttuneError(f"--data {data}: is a folder, {task}; say --tasks {' or '.join(near)}")
    if data is not None:
        sources.check_source(data)
    if not names and (source := data or held_out):
        why = "by the rows of --data" if data else "the held-out rows of the run"
        return [own.of_rows(source, *trained.reading(source))], source, why
    if not names:
        why = f"the run held out {100 * share:g} % of its own rows, which are no file: give yours with --data FILE"
        return ["builtin:arithmetic"], None, why if share else "no --tasks, no --data, and no data.eval of a run"
    with_rows = [name for name in names if name in own.NAMES]
    if data is not None and not with_rows:
        raise FasttuneError(f"--data would be ignored by {', '.join(names)}: it is for {', '.join(own.NAMES)}")
    for name in with_rows:
        builtin = name == "builtin:arithmetic"
        if data is None and not builtin:
            raise FasttuneError(f"--tasks {name}: needs its rows; add --data FILE")
        if data is not None and builtin != data.startswith("builtin:"):
            raise FasttuneError(f"--data {data}: is not for {name}; leave --tasks out to take the task that fits")
    return names, data, "as asked for"


def _with_folder(names: list[str], of_benchmarks: list[str], data: str | None) -> tuple[list[str], str | None, str]:
    benchmarks.check(data, of_benchmarks)
    if others := [name for name in names if name in own.NAMES]:
        raise FasttuneError(f"--tasks {others[0]}: reads no folder, {of_benchmarks[0]} does; evaluate them one by one")
    return names, data, "as asked for"


def asked_in_turns(asked: bool | None, names: list[str], trained: TrainedModel) -> tuple[bool, str]:
    """(whether prompts go through the chat template, why). Raises FasttuneError where the tasks differ in that."""
    if asked is not None:
        return asked, "as asked for"
    if trained.config is not None and trained.config.data.format == "text":
        return False, "the model was trained on plain text"
    if not pretrained.read_tokenizer(trained.tokenizer_source).chat_template:
        return False, "the model has no chat template"
    plain = [name for name in names if name in benchmarks.NAMES]
    if plain and len(plain) < len(names):
        other = next(name for name in names if name not in plain)
        raise FasttuneError(
            f"--tasks: {plain[0]} is asked as plain text, {other} in the model's chat template; add --no-chat-template "
            "or --chat-template for both, or evaluate them one by one"
        )
    if plain:
        return False, "as the authors of these tasks ask; --chat-template asks in the model's own"
    return True, "the model has one"


def show(result: dict[str, Any], page: Console = terminal.console) -> None:
    """The scores on the terminal, shares in percent with their 95 % interval, and where the files are."""
    tasks: dict[str, list[list[Text]]] = {}
    for score in result["scores"]:
        cells = (_named(score), _shown(score), f"{score.problems:,} problems")
        tasks.setdefault(score.task, []).append([Text(cell) for cell in cells])
    page.print(Padding(terminal.under_names(tasks, "lrr", page.width), (1, 0), expand=False))
    kept = f", {result['from_cache']:,} of them answered before" if result["from_cache"] else ""
    page.print(Text(f"{result['requests']:,} requests{kept}, {report.duration(result['seconds'])}", style="dim"))
    for name in EVAL_FILES:
        page.print(Text(str(Path(result["output_dir"]) / name)), soft_wrap=True)


def _named(score: Score) -> str:
    """The metric, and below it what guessing would reach."""
    if score.chance is None or score.corrected is None:
        return score.metric
    return f"{score.metric}\nchance {report.percent(score.chance)}, above it {report.percent(score.corrected)}"


def _shown(score: Score) -> str:
    """Shares of problems as 40.0 % (95 %: 25 to 57), other shares as 55.0 % ± 7.9; a perplexity, say, as it is."""
    value, stderr = (math.nan if each is None else each for each in (score.value, score.stderr))
    if score.low is not None and score.high is not None:
        return f"{report.percent(value)} (95 %: {report.interval(score.low, score.high)})"
    share = 0 <= value <= 1 and "perplexity" not in score.metric
    text = report.percent(value) if share else f"{value:,.4g}"
    return text if math.isnan(stderr) else f"{text} ± {100 * stderr if share else stderr:,.2g}"


def _folder(trained: TrainedModel, out: str | None) -> Path:
    """--out, else the run's own folder, else runs/eval-NAME-DATE. Raises OutputError where it cannot be written."""
    stem = trained.name.rstrip("/").rpartition("/")[2].replace(":", "-")
    folder = Path(out) if out else trained.run or Path(f"runs/eval-{stem}-{datetime.now():%Y%m%d-%H%M%S}")
    return writable(folder)


def writable(folder: Path) -> Path:
    """A folder of --out, as it will be made. Raises OutputError where it cannot be written."""
    folder = folder.expanduser()
    above = hardware.nearest_existing(folder)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"--out {folder}: {above} is not a folder that can be written; name another with --out DIR")
    return folder
