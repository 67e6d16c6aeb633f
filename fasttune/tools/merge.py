"""`fasttune merge`: check → write beside DIR → compare with base + adapter → model card → DIR, whole or not there."""

import argparse
import json
import os
import shlex
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors

from fasttune import child_process, next_steps, report, terminal
from fasttune.core import pretrained, run_folder
from fasttune.errors import FasttuneError, ModelError, OutputError, RunFailed, in_one_line, last_line
from fasttune.settings import ModelConfig
from fasttune.system import library_log, take_over_loggers
from fasttune.tools import card, gguf_file, merged_weights, modelfile
from fasttune.tools.merge_check import Comparison
from fasttune.tools.trained_model import TrainedModel, open_run

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", None: None}
DISK_ERRORS = (OSError, safetensors.SafetensorError)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do what was asked for; returns what --json prints. Raises FasttuneError, with nothing half-written.

    A model that was written and does not answer as base + adapter does is kept as DIR.unverified.
    """
    started, reporter = time.perf_counter(), terminal.Reporter()
    trained, out = open_run(options.model, options.trust_remote_code), Path(options.out).expanduser()
    check_options(trained, out, options)
    if options.gguf:
        gguf_file.check_program(options.gguf)
    for text in trained.warnings:
        reporter.warn(text)
    reporter.note("importing torch, transformers and peft …")
    with library_log():
        if options.push_to_hub:
            check_hub(options.push_to_hub)
        base = trained.base.name
        if options.gguf:
            sources = pretrained.read_architecture(trained.base), pretrained.read_tokenizer(trained.tokenizer_source)
            gguf_file.check(*sources)
        if trained.base.quantization == "nf4":
            reporter.note(f"the adapter was trained on nf4 weights; it is merged into {base} itself, unquantized")
        merge, dtype = merged_weights.plan(trained.base, trained.adapter), DTYPES[options.dtype]
        take_over_loggers()
        run_folder.check_space(out, merge.gib(dtype), "--out")
        what = f"{len(merge.deltas)} weights gain an adapter" if trained.adapter else "no adapter, only cast"
        whole = f", {len(merge.replaced)} are replaced whole" if merge.replaced else ""
        reporter.note(
            f"{what}{whole}; {len(merge.shards)} shard{'s' * (len(merge.shards) != 1)} of {base}, "
            f"written in {dtype or 'the dtype of its own files (--dtype changes it)'}"
        )
        unwritten = in_one_line(OutputError, f"--out: {out} was not written", "free space on its disk", DISK_ERRORS)
        prefix = f".{out.name}-"
        with unwritten, tempfile.TemporaryDirectory("", prefix, out.parent, ignore_cleanup_errors=True) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            merged_weights.write(merge, made, dtype, lambda share: reporter.progress("merging", share))
            pretrained.read_tokenizer(trained.tokenizer_source).save_pretrained(made)
            reporter.note("comparing the logits of the written model with those of base + adapter …")
            try:
                compared = compare(made, trained)
            except RunFailed as error:
                raise RunFailed(f"{error}; it is kept as {place(made, unverified(out))}") from error
            card.write(made, card.of(trained), compared)
            done = place(made, out if compared.verified else unverified(out))
    tell(compared, done, reporter)
    result = {"model": options.model, "out": str(done), "verified": compared.verified, **asdict(compared)}
    if compared.verified:
        result["gguf"] = to_gguf(out, options.gguf, reporter) if options.gguf else None
        result["url"] = push(out, options.push_to_hub, reporter) if options.push_to_hub else None
    return {**result, "wall_s": time.perf_counter() - started}


def check_options(trained: TrainedModel, out: Path, options: argparse.Namespace) -> None:
    """What can be refused at once. Raises FasttuneError."""
    weights, parent = Path(trained.weights), out.absolute().parent
    if trained.run and weights.is_symlink():
        raise ModelError(f"{options.model}: {weights} is a link; name the folder itself, {weights.resolve()}")
    if trained.adapter is None and options.dtype is None:
        raise ModelError(
            f"{options.model}: has no adapter, there is nothing to merge: {trained.base.name} is the whole model; "
            "--dtype bf16 writes a copy in that dtype"
        )
    if not options.overwrite and out.exists():
        raise OutputError(f"--out: {out} exists; name another folder, or replace it with --overwrite")
    if not options.overwrite and unverified(out).exists():
        raise OutputError(
            f"--out: {unverified(out)} exists, a merge that was not verified; remove it, or replace it with --overwrite"
        )
    if out.exists() and not (out / "config.json").is_file():
        raise OutputError(f"--out: {out} is no model folder, so --overwrite does not replace it; name another")
    inside = [Path(name).expanduser() for name in (trained.base.name, str(trained.adapter))]
    if any(path.exists() and path.resolve().is_relative_to(out.resolve()) for path in inside):
        raise OutputError(f"--out: {out} is what would be merged; name another folder")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"--out: {parent} is no folder that can be written to; make it, or name another")


def compare(made: Path, trained: TrainedModel) -> Comparison:
    """In a fresh process without unsloth: what any other user of the folder will load. Raises RunFailed."""
    given = {
        "base": pretrained.locate(trained.base),
        "revision": trained.base.revision,
        "adapter": str(trained.adapter) if trained.adapter else None,
        "trust_remote_code": trained.base.trust_remote_code,
    }
    command = child_process.command("fasttune.tools.merge_check", str(made), json.dumps(given))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_process.environment())
    if done.returncode:
        told = last_line(done.stderr, f"code {done.returncode}")
        raise RunFailed(f"the merged model could not be compared with base + adapter: {told}")
    return Comparison(**json.loads(done.stdout.splitlines()[-1]))


def unverified(out: Path) -> Path:
    return out.with_name(out.name + ".unverified")


def place(made: Path, out: Path) -> Path:
    """Give the complete folder its name, which is returned; what may be replaced goes with the temporary folder."""
    if out.exists():
        out.rename(made.with_name("old"))
    return made.rename(out)


def tell(compared: Comparison, folder: Path, reporter: terminal.Reporter) -> None:
    reporter.note(
        f"largest difference of a logit {compared.largest_difference:.2g} (allowed {compared.tolerance:.2g} for "
        f"{compared.written_in}; the adapter moves them by up to {compared.adapter_effect:.2g}); same most likely "
        f"token at {report.percent(compared.same_choice)} of {compared.positions} positions; "
        f"computed in {compared.computed_in}"
    )
    if not compared.verified:
        lacks = f" It lacks {', '.join(compared.missing[:3])}." if compared.missing else ""
        reporter.warn(f"the merged model does not answer as base + adapter does.{lacks} It is kept as {folder}")
        return
    if compared.adapter_effect and not compared.seen:
        reporter.warn(
            f"the adapter changes no more than {compared.written_in} rounds away, so a wrong merge would not show; "
            "with --dtype fp32 it would"
        )
    loaded = f'transformers.AutoModelForCausalLM.from_pretrained("{folder}")'
    reporter.lines([("merged", str(folder)), ("load it", loaded), ("serve", next_steps.serve_model(str(folder)))])


def to_gguf(folder: Path, kind: str, reporter: terminal.Reporter) -> str:
    """DIR/NAME-KIND.gguf and a Modelfile for Ollama beside it. Raises FasttuneError; the merged model stays."""
    from transformers import GenerationConfig

    target, temporary = folder / f"{folder.name}-{kind}.gguf", folder / f".{folder.name}.gguf"
    try:
        with in_one_line(OutputError, f"--gguf: {target} was not written", "free space on its disk", DISK_ERRORS):
            gguf_file.write(folder, temporary, kind, lambda share: reporter.progress(f"writing {target.name}", share))
            temporary.rename(target)
    except FasttuneError as error:
        raise type(error)(f"{error}; the merged model is in {folder}") from error
    finally:
        temporary.unlink(missing_ok=True)
        reporter.stop()
    source = ModelConfig(name=str(folder))
    config, tokenizer = pretrained.read_architecture(source), pretrained.read_tokenizer(source)
    said = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
    content = modelfile.text(target.name, config, tokenizer, modelfile.stops(config, said, tokenizer))
    report.write_text(folder / "Modelfile", content)
    ollama = f"ollama create {shlex.quote(folder.name)} -f {shlex.quote(str(folder / 'Modelfile'))}"
    served = f"llama-server --jinja -m {shlex.quote(str(target))}"
    reporter.lines([("GGUF", str(target)), ("serve", served), ("Ollama", ollama)])
    return str(target)


def check_hub(repo: str) -> None:
    """Before the work is done: the name, the network and the token. Raises FasttuneError with the remedy."""
    import httpx
    import huggingface_hub
    from huggingface_hub import errors, utils

    try:
        utils.validate_repo_id(repo)
        if repo.count("/") != 1:
            raise errors.HFValidationError
        huggingface_hub.HfApi().whoami()
    except errors.HFValidationError:
        raise FasttuneError(f"--push-to-hub {repo}: write owner/name") from None
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
        raise FasttuneError("--push-to-hub: the hub knows no valid token of yours: `hf auth login`") from error
    except (OSError, httpx.HTTPError) as error:  # no network, or HF_HUB_OFFLINE=1
        raise FasttuneError("--push-to-hub: the hub cannot be reached; merge without it and upload later") from error


def push(folder: Path, repo: str, reporter: terminal.Reporter) -> str:
    """Upload a folder and return its address. A new repository is private. Raises RunFailed; the folder stays.

    The token is huggingface_hub's business and is never shown.
    """
    import httpx
    import huggingface_hub

    reporter.note(f"uploading {folder} to {repo} (private, if it is new) …")
    what, fix = f"--push-to-hub: {repo} was not uploaded", f"the model is in {folder}: `hf upload` sends it"
    with in_one_line(RunFailed, what, fix, (OSError, ValueError, httpx.HTTPError)):
        api = huggingface_hub.HfApi()
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repo, commit_message="Upload from fasttune merge")
        return str(url)
