"""`fasttune generate`: options → a loaded model → answers on stdout, in a file, or a conversation."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fasttune import terminal
from fasttune.data import sources
from fasttune.errors import DataError, FasttuneError
from fasttune.quiet import library_log, take_over_loggers
from fasttune.tools import trained_model as opening

BATCH_ROWS, GPU_BATCH_ROWS = 8, 64
DTYPES: dict[str, opening.Dtype] = {"bf16": "bfloat16", "fp32": "float32"}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do what was asked for; returns what --json prints. Raises FasttuneError, with nothing half-written."""
    check(options)
    finished = opening.open_run(options.model, options.trust_remote_code)
    reporter, stdout = terminal.Reporter(), sys.stdout
    reporter.note("importing unsloth and torch …")
    with library_log():  # what libraries say is not part of an answer
        from fasttune.tools import generate as generating

        take_over_loggers()
        dtype = DTYPES[options.dtype] if options.dtype else opening.dtype_for(finished)
        reporter.note(f"loading {finished.weights} in {dtype} …")
        sampling = generating.Sampling(options.max_new_tokens, options.temperature, options.seed)
        turns_for = "--chat" if options.chat else "--system" if options.system else None
        speaker = generating.loaded(finished, dtype, sampling, reporter.note, turns_for)
        for text in finished.warnings:
            reporter.warn(text)

        def write(text: str) -> None:
            stdout.write(terminal.plain(text) if stdout.isatty() else text)
            stdout.flush()

        done: dict[str, Any] = {"model": options.model, "dtype": dtype, **vars(sampling)}
        if options.chat:
            silent = (lambda text: None) if options.json else write
            return {**done, "messages": generating.converse(speaker, options.system, ask, silent)}
        if options.prompt is not None:
            silent = (lambda text: None) if options.json else write
            answer = generating.one(speaker, options.prompt, options.system, silent)
            silent("\n")
            return {**done, "prompt": options.prompt, **vars(answer)}
        rows = options.batch_rows or (GPU_BATCH_ROWS if speaker.model.device.type == "cuda" else BATCH_ROWS)
        out = Path(options.out).expanduser() if options.out else default_out(options.file)
        settings = {"dtype": dtype, "system": options.system, **vars(sampling)}
        found = generating.answer_file(speaker, finished, options.file, out, rows, options.system, settings, reporter)
    reporter.note(
        f"{found['answered']:,} answers, {found['new_tokens']:,} new tokens, {found['new_tokens_per_s']:,.1f} tokens/s "
        f"({rows} rows at once) → {out}"
    )
    return {**done, "batch_rows": rows, **found}


def check(options: argparse.Namespace) -> None:
    """Everything that can be refused before torch is imported. Raises FasttuneError."""
    if options.file is None:
        for given, flag in ((options.out, "--out"), (options.batch_rows, "--batch-rows")):
            if given is not None:
                raise FasttuneError(f"{flag} would be ignored: it is for --file")
    else:
        sources.check_source(options.file)
    if options.max_new_tokens < 1 or (options.batch_rows is not None and options.batch_rows < 1):
        raise FasttuneError("--max-new-tokens and --batch-rows: 1 or more")
    if not 0 <= options.temperature < float("inf"):
        raise FasttuneError(f"--temperature {options.temperature}: 0 (greedy) or more")
    if options.prompt is not None and not options.prompt.strip():
        raise DataError("--prompt is empty; say what is asked")
    for flag, text in (("--prompt", options.prompt), ("--system", options.system)):
        if any("\ud800" <= character <= "\udfff" for character in text or ""):  # as Python reads a byte like \xe9
            raise DataError(f"{flag}: {text[:100]!a} is no UTF-8; set the terminal to UTF-8, or give a --file")


def default_out(source: str) -> Path:
    """rows.answers.jsonl in the current folder, of rows.jsonl, rows.jsonl.gz or builtin:rows."""
    return Path(Path(source.rpartition(":")[2]).name.partition(".")[0] + ".answers.jsonl")


def ask() -> str | None:
    """A line of stdin, asked for on stderr where a person sits; None at its end."""
    if sys.stdin.isatty():
        print("you: ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise DataError(f"--chat: what was typed is no UTF-8 ({error.reason}); set the terminal to UTF-8") from error
    return line.rstrip("\n") if line else None
