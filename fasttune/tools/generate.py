"""`fasttune generate`: answers of a model, with the chat template it was trained with: one that streams to stdout, a
file of rows, or a conversation.

speaker = load(open_run(RUN), "float32", Sampling(), print)
speaker.batch([speaker.prompt([{"role": "user", "content": "2 + 3?"}])])
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttune import terminal
from fasttune.core import decoding, pretrained
from fasttune.data import chat, sources
from fasttune.data.formats import Message, Unusable
from fasttune.errors import DataError, FasttuneError, ModelError, RunFailed, first_line
from fasttune.system import library_log, take_over_loggers
from fasttune.tools import questions, trained_model
from fasttune.tools.trained_model import Dtype, TrainedModel

BATCH_ROWS, GPU_BATCH_ROWS = 8, 64
DTYPES: dict[str, Dtype] = {"bf16": "bfloat16", "fp32": "float32"}
END_OF_CHAT = ("/exit", "/quit")

Write = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0. `seed` counts only above it."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """`tokens` counts the end-of-turn token; `finish` is "stop" when the model ended by itself, else "length"."""

    text: str
    tokens: int
    finish: str


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do what was asked for; returns what --json prints. Raises FasttuneError, with nothing half-written."""
    check_options(options)
    trained = trained_model.open_run(options.model, options.trust_remote_code)
    reporter, stdout = terminal.Reporter(), sys.stdout

    def write(text: str) -> None:
        if not options.json:
            stdout.write(terminal.plain(text) if stdout.isatty() else text)
            stdout.flush()

    reporter.note("importing unsloth and torch …")
    with library_log():  # what libraries say is not part of an answer
        import fasttune.core.model  # noqa: F401  first: it imports unsloth, which comes before transformers

        take_over_loggers()
        dtype = DTYPES[options.dtype] if options.dtype else trained_model.dtype_for(trained)
        sampling = Sampling(options.max_new_tokens, options.temperature, options.seed or 0)
        turns_for = "--chat" if options.chat else "--system" if options.system else None
        speaker = load(trained, dtype, sampling, reporter.note, turns_for)
        reporter.stop()  # the clock of the loading must not run beside what is typed and answered
        for text in trained.warnings:
            reporter.warn(text)
        done = {"model": options.model, "dtype": dtype, **vars(sampling)}
        if options.chat:
            reporter.note("/new starts a new conversation, /exit ends it, Ctrl-C stops an answer")
            return {**done, "messages": converse(speaker, options.system, ask, write)}
        if options.prompt is not None:
            answer = answer_one(speaker, options.prompt, options.system, write)
            write("\n")
            return {**done, "prompt": options.prompt, **vars(answer)}
        rows = options.batch_rows or (GPU_BATCH_ROWS if speaker.model.device.type == "cuda" else BATCH_ROWS)
        # rows.answers.jsonl in the current folder, of rows.jsonl, rows.jsonl.gz or builtin:rows
        stem = Path(options.file.rpartition(":")[2]).name.partition(".")[0]
        out = Path(options.out or f"{stem}.answers.jsonl").expanduser()
        settings = {"dtype": dtype, "system": options.system, **vars(sampling)}
        found = answer_file(speaker, trained, options.file, out, rows, settings, reporter)
    reporter.note(
        f"{found['answered']:,} answers, {found['new_tokens']:,} new tokens, {found['new_tokens_per_s']:,.1f} tokens/s "
        f"({rows} rows at once) → {out}"
    )
    return {**done, "batch_rows": rows, **found}


def check_options(options: argparse.Namespace) -> None:
    """Everything that can be refused before torch is imported. Raises FasttuneError."""
    if options.file is not None:
        sources.check_source(options.file)
    for flag, given in (("--out", options.out), ("--batch-rows", options.batch_rows)):
        if options.file is None and given is not None:
            raise FasttuneError(f"{flag} would be ignored: it is for --file")
    if not 0 <= options.temperature < float("inf"):
        raise FasttuneError(f"--temperature {options.temperature}: 0 (greedy) or more")
    if options.seed is not None and not options.temperature:
        raise FasttuneError(f"--seed {options.seed} would be ignored: --temperature 0 is greedy; give one above it")
    if options.prompt is not None and not options.prompt.strip():
        raise DataError("--prompt is empty; say what is asked")
    for flag, text in (("--prompt", options.prompt), ("--system", options.system)):
        if any("\ud800" <= character <= "\udfff" for character in text or ""):  # as Python reads a byte like \xe9
            raise DataError(f"{flag}: {text[:100]!a} is no UTF-8; set the terminal to UTF-8, or give a --file")


def load(
    trained: TrainedModel, dtype: Dtype, sampling: Sampling, note: Write, turns_for: str | None = None
) -> "Speaker":
    """Load what was named; say how prompts are put where there is no chat template to follow.

    `turns_for`: the option that needs one. Raises FasttuneError for it before the weights are read.
    """
    why = None
    if trained.config is not None and trained.config.data.format == "text":
        why = "the model was trained on plain text"
    elif not pretrained.read_tokenizer(trained.tokenizer_source).chat_template:
        why = "the model has no chat template"
    if why and turns_for:
        raise FasttuneError(f"{turns_for} would be ignored: {why}; --prompt TEXT or --file continues a text as it is")
    note(f"loading {trained.weights} in {dtype} …")
    if why:
        note(f"prompts are continued as they are: {why}")
    return Speaker(*trained_model.load(trained, dtype), why is not None, sampling)


class Speaker:
    """A loaded model that answers. `raw`: prompts are continued as they are, without a chat template."""

    def __init__(self, model: Any, tokenizer: Any, raw: bool, sampling: Sampling):
        self.model, self.tokenizer, self.raw, self.sampling = model, tokenizer, raw, sampling
        self.template = chat.template_of(tokenizer) if tokenizer.chat_template else None
        self.stops = decoding.stop_ids(model, tokenizer)
        self.positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def prompt(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        """The text the model is given. Raises Unusable where the chat template refuses."""
        if self.raw or self.template is None:
            bos = self.tokenizer.bos_token if self.tokenizer("x").input_ids[:1] == [self.tokenizer.bos_token_id] else ""
            return (bos or "") + messages[-1]["content"]
        return self.template.prompt(messages, tools)

    def length(self, prompt: str) -> int:
        """Tokens of a prompt. Raises Unusable where it is no text, or no room is left for an answer."""
        if why := decoding.refusal(self.model, self.tokenizer, prompt):
            raise Unusable(why)
        tokens, most = len(self.tokenizer(prompt, add_special_tokens=False).input_ids), self.sampling.max_new_tokens
        if not tokens:
            raise Unusable("the tokenizer makes no token of it")
        if self.positions and tokens + most > self.positions:
            raise Unusable(f"{tokens:,} tokens and {most:,} new ones exceed the model's {self.positions:,} positions")
        return tokens

    def batch(self, prompts: list[str], seed: int = 0, streamer: Any = None) -> list[Answer]:
        """Answers in the order of the prompts, which are padded on the left. Raises RunFailed out of memory."""
        import torch

        heat, more = self.sampling.temperature, {"streamer": streamer}
        more |= {"do_sample": True, "temperature": heat, "top_p": 1.0, "top_k": 0} if heat > 0 else {}
        torch.manual_seed(self.sampling.seed + seed)
        try:
            found = decoding.generate(
                self.model, self.tokenizer, prompts, self.stops, self.sampling.max_new_tokens, **more
            )
        except torch.OutOfMemoryError as error:
            raise RunFailed(f"out of memory with {len(prompts)} rows at once; lower --batch-rows") from error
        except UnicodeError:  # of the streamer
            raise
        except (TypeError, ValueError) as error:  # transformers, over what the model says of itself
            raise ModelError(f"generation_config.json of the model: {first_line(error)[:200]}; fix it there") from error
        return [self._answer(ids) for ids in found.tolist()]

    def stream(self, messages: list[Message], write: Write) -> Answer:
        """One answer, given to `write` as it comes. Raises Unusable for what cannot be asked."""
        from transformers import TextStreamer

        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = lambda text, stream_end=False: write(text)
        prompt = self.prompt(messages)
        self.length(prompt)
        return self.batch([prompt], streamer=streamer)[0]

    def _answer(self, ids: list[int]) -> Answer:
        end = next((at for at, token in enumerate(ids, 1) if token in self.stops), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Answer(text, end or len(ids), "stop" if end else "length")


def answer_one(speaker: Speaker, text: str, system: str | None, write: Write) -> Answer:
    """The answer to one prompt, streamed. Raises DataError for one that does not fit."""
    first = [{"role": "system", "content": system}] if system else []
    try:
        return speaker.stream([*first, {"role": "user", "content": text}], write)
    except Unusable as error:
        raise DataError(f"--prompt: {error}") from error


def converse(speaker: Speaker, system: str | None, read: Callable[[], str | None], write: Write) -> list[Message]:
    """A conversation until `read` gives None or /exit; /new forgets what was said. Returns its turns."""
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    while (said := read()) is not None and said.strip() not in END_OF_CHAT:
        if said.strip() == "/new":
            messages = list(first)
        elif said.strip():
            asked = [*messages, {"role": "user", "content": said}]
            try:
                answer = speaker.stream(asked, write)
            except Unusable as error:
                write(f"({error}; /new starts a new one)\n")
                continue
            except KeyboardInterrupt:  # of this answer; at the question it ends the conversation
                write("\n")
                continue
            write("\n")
            messages = [*asked, {"role": "assistant", "content": answer.text}]
    return messages


def ask() -> str | None:
    """A line of stdin, asked for on stderr where a person sits; None at its end.

    With both ends at a terminal it can be edited, and earlier ones come back with the arrow keys (readline). They are
    in memory only: nothing that was said is written anywhere.
    """
    try:
        if sys.stdin.isatty() and sys.stdout.isatty():
            with suppress(ImportError):  # a Python without it asks all the same
                import readline  # noqa: F401  input() uses it
            return input("you: ")
        if sys.stdin.isatty():
            print("you: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"--chat: what was typed is no UTF-8 ({error.reason}); set the terminal to UTF-8") from error
    return line.rstrip("\n") if line else None


def answer_file(
    speaker: Speaker,
    trained: TrainedModel,
    source: str,
    out: Path,
    batch_rows: int,
    settings: dict[str, Any],
    reporter: Any,
) -> dict[str, Any]:
    """Answer every row of a file that `out` does not hold yet, a line each, written batch by batch, longest first.

    Returns what was done, for --json. Raises DataError for rows that are none, OutputError for an `out` of other
    rows, weights or settings, RunFailed out of memory (what was answered stays).
    """
    started = time.perf_counter()
    asked, skipped = _prompts(speaker, trained, source, settings.get("system"))
    first = next((f"; row {row}: {reason}" for row, reason in skipped.items()), "")
    if not asked:
        raise DataError(f"--file: {source} holds no row that can be asked{first}")
    tokens = 0
    with questions.opened(out, questions.identity(trained, source, settings)) as answers:
        left = sorted((row for row in asked if row[1] not in answers.rows), key=lambda row: (-row[0], row[1]))
        if answers.rows:
            reporter.note(f"{out} holds {len(answers.rows):,} answers already: {len(left):,} left")
        if skipped:
            reporter.warn(f"{len(skipped):,} rows are skipped{first}")
        for at in range(0, len(left), batch_rows):
            reporter.progress("answering", at / len(left))
            _, rows, prompts = zip(*left[at : at + batch_rows], strict=True)
            found = speaker.batch(list(prompts), seed=rows[0])
            answers.add([{"row": row, **vars(answer)} for row, answer in zip(rows, found, strict=True)])
            tokens += sum(answer.tokens for answer in found)
        reporter.progress("answering", 1.0)
    wall_s = time.perf_counter() - started
    return {
        "out": str(out),
        "rows": len(asked) + len(skipped),
        "answered": len(left),
        "answered_before": len(asked) - len(left),
        "left_out": len(skipped),
        "new_tokens": tokens,
        "wall_s": wall_s,
        "new_tokens_per_s": tokens / wall_s,
    }


def _prompts(
    speaker: Speaker, trained: TrainedModel, source: str, system: str | None
) -> tuple[list[tuple[int, int, str]], dict[int, str]]:
    """((tokens, row, prompt) of every row that can be asked, row → why not of the others)."""
    asked: list[tuple[int, int, str]] = []
    skipped: dict[int, str] = {}
    columns, split = trained.config.data.columns if trained.config else {}, trained.reading(source)[0]
    for row, question in questions.read(source, columns, system, split, skipped):
        if speaker.raw and (len(question.messages) > 1 or question.tools):
            raise DataError(
                f"--file: {source}: row {row} has several turns or tools, and without a chat template only one "
                'text can be continued; write {"prompt": …}'
            )
        try:
            prompt = speaker.prompt(question.messages, question.tools)
            asked.append((speaker.length(prompt), row, prompt))
        except Unusable as error:
            skipped[row] = str(error)
    return asked, skipped
