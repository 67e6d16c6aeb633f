"""`fasttune eval`: a finished run or a model on tasks of EleutherAI's harness → scores, and every problem beside them.

result = run("runs/quickstart-…", tasks="builtin:arithmetic", reporter=terminal.Reporter())

Writes eval.json and eval_samples.jsonl (a line a problem: prompt, generation, extracted answer, reference, right).
"""

import importlib.metadata
import importlib.util
import os
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fasttune import hardware, report, stack, terminal
from fasttune.core.run_folder import EVAL_FILES
from fasttune.data import arithmetic, chat, sources
from fasttune.errors import FasttuneError, OutputError, RunFailed
from fasttune.quiet import library_log, take_over_loggers
from fasttune.tools import card, tasks as own, trained_model as finished_models
from fasttune.tools.trained_model import Finished

BATCH_ROWS_CPU, BATCH_ROWS_GPU = 16, 64
NEEDS = ("lm_eval", "sacrebleu")  # imported by the harness at its start
INSTALL = "bash scripts/setup_h100.sh (outside a checkout: pip install 'fasttune[eval]')"


@dataclass(frozen=True)
class Score:
    """One figure of one task: the mean over its problems with its standard error (None where there is no such)."""

    task: str
    metric: str
    value: float
    stderr: float | None
    problems: int


@dataclass
class EvalResult:
    """The contract of `eval.json`. `from_cache`: requests that this very model had answered before."""

    model: str
    weights: str
    output_dir: str
    tasks: list[str]
    data: str | None
    limit: int | None
    scores: list[Score]
    batch_rows: int
    dtype: str
    requests: int
    from_cache: int
    seconds: float
    date: str
    hardware: str
    versions: dict[str, str]
    warnings: list[str] = field(default_factory=list)


def run(
    name: str,
    reporter: terminal.Reporter,
    tasks: str | None = None,
    data: str | None = None,
    limit: int | None = None,
    output: str | None = None,
    batch_rows: int | None = None,
    keep_answers: bool = True,
    trust_remote_code: bool = False,
) -> EvalResult:
    """Score RUN or MODEL, write the two files and return the scores. Raises FasttuneError in one line."""
    started = time.perf_counter()
    check_installed()
    finished = finished_models.open_run(name, trust_remote_code)
    names, data, why = choose(tasks, data, finished)
    folder = _folder(finished, output)
    reporter.note(f"tasks: {', '.join(names)}{f' on {data}' if data else ''} ({why})")
    reporter.note("importing unsloth and torch …")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars; read when tqdm is imported
    with library_log():
        from fasttune.tools import harness

        take_over_loggers()
        # Bad rows are told of before the weights are read.
        loaded = harness.load_tasks(names, data, *finished.reading(data or ""))
        reporter.note(f"loading {finished.weights} …")
        dtype = finished_models.dtype_for(finished)
        model, tokenizer = finished_models.load(finished, dtype)
        changes = chat.complete(tokenizer)
        for text in [*finished.warnings, *(f"chat template: {what}: {reason}" for what, reason in changes)]:
            reporter.warn(text)
        rows = batch_rows or (BATCH_ROWS_GPU if model.device.type == "cuda" else BATCH_ROWS_CPU)
        known = harness.answers_of(model, tokenizer, keep_answers)
        asked = harness.Harness(model, tokenizer, rows, known, reporter.progress)
        try:
            raw = harness.run(asked, loaded, limit)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            raise RunFailed(f"out of memory with {rows} rows at once; lower --batch-rows") from error
        finally:
            known.close()
            reporter.stop()
    result = EvalResult(
        model=name,
        weights=finished.weights,
        output_dir=str(folder),
        tasks=names,
        data=data,
        limit=limit,
        scores=scores(raw),
        batch_rows=rows,
        dtype=dtype,
        requests=asked.from_cache + asked.computed,
        from_cache=asked.from_cache,
        seconds=time.perf_counter() - started,
        date=datetime.now().isoformat(timespec="seconds"),
        hardware=hardware.line(hardware.detect(folder)),
        versions=stack.versions() | {"lm_eval": importlib.metadata.version("lm_eval")},
        warnings=finished.warnings,
    )
    write(folder, result, [problem(task, sample) for task, found in raw["samples"].items() for sample in found])
    if finished.run and folder.resolve() == finished.run.resolve():
        card.of_run(finished.run)
    return result


def check_installed() -> None:
    """Raise FasttuneError with the command where the harness is not installed."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise FasttuneError(f"eval: {', '.join(missing)} is not installed; bring the environment up to date: {INSTALL}")


def choose(tasks: str | None, data: str | None, finished: Finished) -> tuple[list[str], str | None, str]:
    """(task names, source of their rows, why these). Raises FasttuneError for a combination that would be ignored."""
    held_out = finished.config.data.eval if finished.config else None
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if data is not None:
        sources.check_source(data)
    if not names and data is None and held_out is None:
        share = finished.config.data.eval_share if finished.config else 0
        why = f"the run held out {100 * share:g} % of its own rows, which are no file: give yours with --data FILE"
        return ["builtin:arithmetic"], None, why if share else "no --tasks, no --data, and no data.eval of a run"
    if not names:
        source = data or held_out or ""
        why = "by the rows of --data" if data else "the held-out rows of the run"
        return [own.of_rows(source, *finished.reading(source))], source, why
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


def scores(raw: dict[str, Any]) -> list[Score]:
    """The harness's figures, a row each, tasks before groups."""
    found = []
    for task, values in {**raw["results"], **raw.get("groups", {})}.items():
        count = raw["n-samples"].get(task, {}).get("effective") or values.get("sample_len", 0)
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric} ({kind})"
            found.append(Score(task, label, value, error if isinstance(error, float) else None, count))
    return found


def problem(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """One line of eval_samples.jsonl."""
    metrics = {name: sample[name] for name in sample["metrics"]}
    line = {"task": task, "number": sample["doc_id"] + 1, "prompt": sample["arguments"][0][0]}
    if task in own.NAMES and "exact_match" in metrics:
        generation, reference = sample["resps"][0][0], sample["target"]
        extracted = {"extracted": arithmetic.final_number(generation), "expected": arithmetic.final_number(reference)}
        return line | {
            "generation": generation,
            **extracted,
            "reference": reference,
            "right": metrics["exact_match"] > 0,
        }
    line |= {"target": sample["target"], "filter": sample["filter"], "metrics": metrics}
    if len(sample["arguments"]) > 1:  # the options of a multiple choice, with their log-likelihoods
        line["options"] = [arguments[1] for arguments in sample["arguments"]]
    return line | {"responses": [responses[0] for responses in sample["resps"]]}


def write(folder: Path, result: EvalResult, problems: list[dict[str, Any]]) -> None:
    """eval_samples.jsonl, then eval.json: each whole or as it was before."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--out {folder}: cannot be made ({error.strerror}); name another folder") from error
    lines = "".join(report.to_json_line(line) + "\n" for line in problems)
    report.write_bytes(folder / EVAL_FILES[1], lines.encode())
    report.write_json(folder / EVAL_FILES[0], result)


def show(result: EvalResult, page: Console = terminal.console) -> None:
    """The scores on the terminal, an accuracy in percent with its standard error, and where the files are."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for heading in ("task", "metric", "score", "problems"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for score in result.scores:
        table.add_row(Text(score.task), Text(score.metric), Text(_shown(score)), f"{score.problems:,}")
    page.print(Padding(table, (1, 0)))
    kept = f", {result.from_cache:,} of them answered before" if result.from_cache else ""
    page.print(Text(f"{result.requests:,} requests{kept}, {report.duration(result.seconds)}", style="dim"))
    for name in EVAL_FILES:
        page.print(Text(str(Path(result.output_dir) / name)), soft_wrap=True)


def _shown(score: Score) -> str:
    """Shares as 55.0 % ± 7.9; anything else (a perplexity) as it is."""
    share = 0 <= score.value <= 1 and "perplexity" not in score.metric
    value = f"{100 * score.value:.1f} %" if share else f"{score.value:,.4g}"
    if score.stderr is None or score.stderr != score.stderr:
        return value
    return f"{value} ± {100 * score.stderr if share else score.stderr:,.2g}"


def _folder(finished: Finished, output: str | None) -> Path:
    """--out, else the run's own folder, else runs/eval-NAME-DATE. Raises OutputError where it cannot be written."""
    stem = finished.name.rstrip("/").rpartition("/")[2].replace(":", "-")
    folder = Path(output) if output else finished.run or Path(f"runs/eval-{stem}-{datetime.now():%Y%m%d-%H%M%S}")
    above = folder.expanduser().absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"--out {folder}: {above} is not a folder that can be written; name another with --out DIR")
    return folder.expanduser()
