"""Answers of a model, with the chat template it was trained with: one that streams, a file of rows, or a conversation.

speaker = Speaker(*finished.load(run, dtype), raw=False, sampling=Sampling())
speaker.batch([speaker.prompt([{"role": "user", "content": "2 + 3?"}])])
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fasttune.core import model as fasttune_model  # noqa: F401  first: it imports unsloth

import torch
import transformers

from fasttune.core import decoding, pretrained
from fasttune.tools import questions, trained_model as opening
from fasttune.tools.trained_model import Dtype, Finished
from fasttune.data import chat
from fasttune.data.formats import Message, Unusable
from fasttune.errors import DataError, FasttuneError, ModelError, RunFailed, first_line

END_OF_CHAT = ("/exit", "/quit")


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
        tokens = len(self.tokenizer(prompt, add_special_tokens=False).input_ids)
        if not tokens:
            raise Unusable("the tokenizer makes no token of it")
        if self.positions and tokens + self.sampling.max_new_tokens > self.positions:
            raise Unusable(
                f"{tokens:,} tokens and {self.sampling.max_new_tokens:,} new ones exceed the model's "
                f"{self.positions:,} positions"
            )
        return tokens

    def batch(self, prompts: list[str], seed: int = 0, streamer: Any = None) -> list[Answer]:
        """Answers in the order of the prompts, which are padded on the left. Raises RunFailed out of memory."""
        heat, more = self.sampling.temperature, {"streamer": streamer}
        more |= {"do_sample": True, "temperature": heat, "top_p": 1.0, "top_k": 0} if heat > 0 else {}
        torch.manual_seed(self.sampling.seed + seed)
        try:
            found = decoding.generate(
                self.model, self.tokenizer, prompts, self.stops, self.sampling.max_new_tokens, **more
            )
        except torch.OutOfMemoryError as error:
            raise RunFailed(f"out of memory with {len(prompts)} rows at once: lower --batch-rows") from error
        except (TypeError, ValueError) as error:  # transformers, over what the model says of itself
            if isinstance(error, UnicodeError):  # of the streamer
                raise
            raise ModelError(f"generation_config.json of the model: {first_line(error)[:200]}; fix it there") from error
        return [self._answer(ids) for ids in found.tolist()]

    def stream(self, prompt: str, write: Callable[[str], None]) -> Answer:
        """One answer, given to `write` as it comes."""
        self.length(prompt)
        return self.batch([prompt], streamer=Pieces(self.tokenizer, write))[0]

    def _answer(self, ids: list[int]) -> Answer:
        ends = [at for at, token in enumerate(ids) if token in self.stops]
        kept = ids[: ends[0] + 1] if ends else ids
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Answer(text, len(kept), "stop" if ends else "length")


class Pieces(transformers.TextStreamer):
    """Text as it becomes certain, to a function instead of to stdout."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def answer_file(
    speaker: Speaker,
    finished: Finished,
    source: str,
    out: Path,
    batch_rows: int,
    system: str | None,
    settings: dict[str, Any],
    reporter: Any,
) -> dict[str, Any]:
    """Answer every row of a file that `out` does not hold yet, a line each, written batch by batch, longest first.

    Returns what was done, for --json. Raises DataError for rows that are none, OutputError for an `out` of other
    rows, weights or settings, RunFailed out of memory (what was answered stays).
    """
    started = time.perf_counter()
    asked, unusable = [], {}
    columns, split = finished.config.data.columns if finished.config else {}, finished.reading(source)[0]
    for row, question in questions.read(source, columns, system, split):
        if isinstance(question, Unusable):
            unusable[row] = str(question)
            continue
        if speaker.raw and (len(question.messages) > 1 or question.tools):
            raise DataError(
                f"--file: {source}: row {row} has several turns or tools, and without a chat template only one "
                'text can be continued; write {"prompt": …}'
            )
        try:
            prompt = speaker.prompt(question.messages, question.tools)
            asked.append((speaker.length(prompt), row, prompt))
        except Unusable as error:
            unusable[row] = str(error)
    if not asked:
        raise DataError(f"--file: {source} holds no row that can be asked{_first(unusable)}")
    with questions.opened(out, questions.identity(finished, source, settings)) as file:
        done = questions.rows_in(file, out)
        left = sorted((row for row in asked if row[1] not in done), key=lambda row: (-row[0], row[1]))
        if done:
            reporter.note(f"{out} holds {len(done):,} answers already: {len(left):,} left")
        if unusable:
            reporter.warn(f"{len(unusable):,} rows are left out{_first(unusable)}")
        tokens = _answer_all(speaker, left, file, batch_rows, reporter)
    wall_s = time.perf_counter() - started
    return {
        "out": str(out),
        "rows": len(asked) + len(unusable),
        "answered": len(left),
        "answered_before": len(asked) - len(left),
        "left_out": len(unusable),
        "new_tokens": tokens,
        "wall_s": wall_s,
        "new_tokens_per_s": tokens / wall_s,
    }


def _answer_all(speaker: Speaker, left: list[tuple[int, int, str]], file: IO[str], rows: int, reporter: Any) -> int:
    tokens = 0
    for at in range(0, len(left), rows):
        group = left[at : at + rows]
        reporter.progress("answering", at / len(left))
        found = speaker.batch([prompt for _, _, prompt in group], seed=group[0][1])
        questions.write(file, [(row, vars(answer)) for (_, row, _), answer in zip(group, found, strict=True)])
        tokens += sum(answer.tokens for answer in found)
    reporter.progress("answering", 1.0)
    return tokens


def _first(unusable: dict[int, str]) -> str:
    return next((f"; row {row}: {reason}" for row, reason in unusable.items()), "")


def one(speaker: Speaker, text: str, system: str | None, write: Callable[[str], None]) -> Answer:
    """The answer to one prompt, streamed. Raises DataError for one that does not fit."""
    first = [{"role": "system", "content": system}] if system else []
    try:
        return speaker.stream(speaker.prompt([*first, {"role": "user", "content": text}]), write)
    except Unusable as error:
        raise DataError(f"--prompt: {error}") from error


def converse(
    speaker: Speaker, system: str | None, read: Callable[[], str | None], write: Callable[[str], None]
) -> list[Message]:
    """A conversation until `read` gives None or /exit; /new forgets what was said. Returns its turns."""
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    while (said := read()) is not None and said.strip() not in END_OF_CHAT:
        if said.strip() == "/new":
            messages = list(first)
            continue
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        try:
            answer = speaker.stream(speaker.prompt(messages), write)
        except Unusable as error:
            messages.pop()
            write(f"({error}; /new begins anew)\n")
            continue
        write("\n")
        messages.append({"role": "assistant", "content": answer.text})
    return messages


def loaded(
    finished: Finished, dtype: Dtype, sampling: Sampling, note: Callable[[str], None], turns_for: str | None = None
) -> Speaker:
    """Load what was named; say how prompts are put where there is no chat template to follow.

    `turns_for`: the option that needs one. Raises FasttuneError for it before the weights are read.
    """
    why = None
    if finished.config is not None and finished.config.data.format == "text":
        why = "the model was trained on plain text"
    elif not pretrained.read_tokenizer(finished.tokenizer_source).chat_template:
        why = "the model has no chat template"
    if why and turns_for:
        raise FasttuneError(f"{turns_for} would be ignored: {why}; --prompt TEXT or --file continues a text as it is")
    if why:
        note(f"prompts are continued as they are: {why}")
    return Speaker(*opening.load(finished, dtype), why is not None, sampling)
