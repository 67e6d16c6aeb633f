"""`fasttune tokenize CONFIG --out PREFIX`: the plain text of a config as Megatron's PREFIX.bin and PREFIX.idx, in the
tokenisation of the config. Megatron, NeMo and `data.train: PREFIX.bin` read it. Loads no weights.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from fasttune import report, terminal
from fasttune.config import Config, changed
from fasttune.core import prepare, pretrained
from fasttune.data import chat, load, megatron
from fasttune.data.store import Rows
from fasttune.errors import DataError, OutputError
from fasttune.system import library_log

AT_ONCE = 1 << 24  # tokens that are copied at once


@dataclass(frozen=True)
class Written:
    """What a corpus has become."""

    prefix: str
    documents: int
    tokens: int
    bytes_a_token: int
    tokenization: str
    seconds: float


def run(config: Config, out: str, reporter: terminal.Reporter) -> Written:
    """Write both files, each beside its name and renamed when it is whole. Raises FasttuneError in one line."""
    started = time.perf_counter()
    prefix = megatron.without_ending(out)
    if not prefix.absolute().parent.is_dir():
        raise OutputError(f"--out {out}: no folder {prefix.parent}; make it, or name another")
    if config.data.eval_share:
        reporter.warn("data.eval_share holds nothing out of these files: all documents are written; train holds out")
    config = _for_files(config)
    prepare.check_sources_and_model(config)
    try:
        with library_log():
            reporter.note(f"reading the tokenizer of {config.model.name} …")
            tokenizer = pretrained.read_tokenizer(config.model)
            chat.complete(tokenizer)
            with megatron.Writer(prefix, len(tokenizer)) as writer:  # first: it refuses what is there
                batches = load.encode(config, tokenizer, True, reporter.progress)
                dropped = batches.dropped or [np.zeros(0)] * len(batches.parts)
                for part, copies in zip(batches.parts, dropped, strict=True):
                    _copy(part, ~np.isin(part.numbers, copies), writer, reporter)
    finally:
        reporter.stop()
    width, seconds = writer.bytes_a_token, time.perf_counter() - started
    return Written(str(prefix), writer.documents, writer.tokens, width, config.data.tokenization, seconds)


def _for_files(config: Config) -> Config:
    """The config with all of each source in documents. Raises DataError for what files of tokens do not keep."""
    data = config.data
    if data.redraw:
        raise DataError("data.redraw splits tokens anew in each epoch, files hold one draw: add data.redraw=false")
    for source, weight in data.sources.items():
        if weight != 1:
            raise DataError(f"data.train: {source} has the weight {weight:g}, which files of tokens do not keep")
    held_out = {"eval": None, "eval_share": 0.0, "eval_split": "test"}
    every: dict[str, Any] = {"eval": {"every": "never", "problems": 0, "keep_best": False}, "samples": 0}
    every["train"] = {"group_by_prompt": False}
    return changed(config, data={"layout": "concat", "too_long": "truncate", **held_out}, **every)


def _copy(part: Rows, kept: np.ndarray, writer: megatron.Writer, reporter: terminal.Reporter) -> None:
    """kept: which of its documents, all but the copies that data.deduplicate leaves out."""
    first = 0
    while first < len(part):
        after = int(part.starts.searchsorted(part.starts[first] + AT_ONCE, side="right")) - 1
        after = max(first + 1, after)  # a document longer than that goes alone
        ids, own, lengths = (
            part.ids[part.starts[first] : part.starts[after]],
            kept[first:after],
            part.lengths[first:after],
        )
        writer.add_many(ids if own.all() else ids[np.repeat(own, lengths)], lengths[own])
        first = after
        reporter.progress(f"writing {Path(part.source).name}", first / len(part))


def show(written: Written) -> None:
    told = f"{written.documents:,} documents, {written.tokens:,} tokens of {written.bytes_a_token} bytes"
    terminal.console.print(Text(f"{told}, {report.duration(written.seconds)}"))
    for ending in ("bin", "idx"):
        terminal.console.print(Text(f"{written.prefix}.{ending}"), soft_wrap=True)
