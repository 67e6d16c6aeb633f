"""Held-out rows, beside a training that does not notice: their loss and token accuracy, and answers to problems."""

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from fasttune.core import model as models  # first: it imports unsloth

import numpy as np
import torch

from fasttune.config import Config
from fasttune.core import decoding
from fasttune.data import sharing, arithmetic, chat, formats, load, sources
from fasttune.data.batching import Batches
from fasttune.data.sharing import Encoded, MicroBatch, flat
from fasttune.data.formats import Row
from fasttune.data.tokenize import IGNORE
from fasttune.errors import DataError
from fasttune.metrics import Evaluation, ExactMatch, HeldOut, Sample, SourceSeen, StepMetrics

if TYPE_CHECKING:
    from fasttune.core.prepare import Job

AT_ONCE = 256  # supervised tokens whose logits are raised to float32 at a time
SOUND_TOKENS = 128  # of the end of a row
LARGEST_WEIGHT = 1e6  # those of models that work are below 1,000
ROWS_AT_ONCE = 40  # problems
Progress = Callable[[str, float], None]
LEAST_NEW_TOKENS, MOST_NEW_TOKENS = 64, 512


class Validator:
    """Measures the model on the job's held-out rows when that is due, and remembers what it saw."""

    def __init__(self, job: "Job", autocast: bool):
        self.job, self.model, self.autocast = job, job.model, autocast
        # (number of its source, micro-batch)
        laid_out = ((at, _laid_out(job, rows)) for at, rows in enumerate(job.held_out.values()))
        self._batches = [(at, batch) for at, batches in laid_out for batch in batches]
        self.before: Evaluation | None = None
        self.last: Evaluation | None = None
        self.best: Evaluation | None = None
        self.since_best = 0  # evaluations

    def due(self, step: int) -> bool:
        """After which steps: 0 is before the first one."""
        every = self.job.config.eval.every_steps
        on_the_way = every is not None and step % every == 0
        return len(self._batches) > 0 and (self._at_an_end(step) or on_the_way)

    def _at_an_end(self, step: int) -> bool:
        return step in (0, self.job.total_steps)

    def missing(self, step: int) -> bool:
        """Whether it is due after `step` and was not done."""
        return self.due(step) and (self.last is None or self.last.step != step)

    def measure(self, step: int, progress: Progress = lambda what, share: None) -> Evaluation:
        """Evaluate now, as the model after `step`."""
        ranks = self.job.ranks
        own = self._sums_of(ranks.share(self._batches), len(self.job.held_out), progress)
        sums = np.reshape(ranks.sum_of_shares(own.ravel().tolist(), f"evaluation after step {step:,}"), own.shape)
        if ranks.parts > 1:  # each has computed all of it: the last bits must not decide what each does next
            sums = np.array(ranks.agree(sums.tolist()))
        loss, right, count = sums.sum(0)
        match = None if self._at_an_end(step) else self._exact_match()  # there all are answered, for the samples
        by_source = {name: float(each[0] / each[2]) for name, each in zip(self.job.held_out, sums, strict=True)}
        several = by_source if len(by_source) > 1 else {}
        self.last = Evaluation(step, float(loss / count), float(right / count), match, several)
        self.before = self.last if step == 0 else self.before
        if step and math.isfinite(self.last.loss) and (self.best is None or self.last.loss < self.best.loss):
            self.best, self.since_best = self.last, 0
        elif step:
            self.since_best += 1
        return self.last

    def catch_up(self, step: int, steps: list[StepMetrics]) -> None:
        """Of a run that is resumed after `step`: the evaluation that a signal left out there, so that the rest is the
        same; it is put into the last of `steps`.
        """
        if not self.missing(step):
            return
        seen = self.measure(step)
        if steps and steps[-1].step == step:
            steps[-1] = replace(
                steps[-1],
                eval_loss=seen.loss,
                eval_token_accuracy=seen.token_accuracy,
                eval_exact_match=seen.exact_match,
            )

    @property
    def ended_early(self) -> str | None:
        """Why the run ends before its last step, for a person; None where it does not: early_stopping_patience."""
        train, last, total = self.job.config.train, self.last, self.job.total_steps
        patience = train.early_stopping_patience
        if patience is None or last is None or self.since_best < patience or last.step >= total:
            return None
        lower = f"below {self.best.loss:.4g} (step {self.best.step:,})" if self.best else "that is finite"
        why = f"no held-out loss {lower} in {self.since_best} evaluations (train.early_stopping_patience)"
        rate = "" if train.scheduler == "constant" else "; its learning rate had not fallen to the end"
        return f"{why}: ended after step {last.step:,} of {total:,}{rate}"

    def _exact_match(self) -> float | None:
        problems = self.job.problems[: self.job.config.eval.problems]
        return arithmetic.accuracy(answer(self.job, problems), [problem.reference for problem in problems])

    def sound(self, row: Encoded) -> bool:
        """Whether the weights as they are now are those of a model: no diverged ones, and a loss on this row."""
        ranks = self.job.ranks
        trained = [ranks.held(parameter) for parameter in self.model.parameters() if parameter.requires_grad]
        largest = float(torch.nn.utils.get_total_norm([part for part in trained if part.numel()], math.inf))
        if ranks.any_of(not largest < LARGEST_WEIGHT, "a look at the weights"):
            return False
        ids = row[0][-SOUND_TOKENS:]
        batch = flat([(ids, np.ones(len(ids), np.bool_))])
        return math.isfinite(self._sums_of([(0, batch if self.job.data.packed else _alone(batch))], 1)[0, 0])

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint, which `restore` takes."""
        seen = {"before": self.before, "last": self.last, "best": self.best}
        return {name: each and asdict(each) for name, each in seen.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """state: of a checkpoint, of which older ones have not all."""
        self.since_best = state.get("evaluations_since_best", 0)
        for name, values in state.get("held_out", {}).items():
            setattr(self, name, Evaluation(**values) if values else None)

    def result(self, saved_step: int | None) -> HeldOut | None:
        """For run.json; None if nothing was measured."""
        if self.last is None:
            return None
        loss_tokens = sum(int((batch["labels"] != IGNORE).sum()) for _, batch in self._batches)
        return HeldOut(
            sum(map(len, self.job.held_out.values())), loss_tokens, self.before, self.last, self.best, saved_step
        )

    def by_source(self, steps: int, tokens_per_s: float | None) -> list[SourceSeen]:
        """What the first steps trained on of each source; nothing where there is only one."""
        if len(self.job.data.parts) == 1:
            return []
        tokens = load.tokens_by_source(self.job.data, steps)
        total = sum(tokens.values()) or 1
        before, after = (seen.loss_by_source if seen else {} for seen in (self.before, self.last))
        return [
            SourceSeen(name, n, tokens_per_s and tokens_per_s * n / total, before.get(name), after.get(name))
            for name, n in tokens.items()
        ]

    def _sums_of(
        self,
        batches: Sequence[tuple[int, MicroBatch]],
        sources: int,
        progress: Progress = lambda what, share: None,
    ) -> np.ndarray:
        """Of each source: summed loss, tokens guessed right, tokens: (sources, 3)."""
        was_training = self.model.training
        self.model.eval()
        sums = np.zeros((sources, 3))
        try:
            for at, (source, batch) in enumerate(batches):
                progress("measuring the held-out loss", at / len(batches))
                sums[source] += self._sums(batch)
            progress("measuring the held-out loss", 1.0)
            return sums
        finally:
            self.model.train(was_training)
            self.job.ranks.apart(self.model)

    @torch.no_grad()
    def _sums(self, batch: MicroBatch) -> tuple[float, float, int]:
        """Summed loss, tokens guessed right, and tokens, of the supervised ones of (1, T)."""
        given = {name: torch.from_numpy(array).to(self.model.device) for name, array in batch.items()}
        labels = given.pop("labels")[0, 1:]  # position t predicts token t + 1
        positions = (labels != IGNORE).nonzero()[:, 0]
        on_gpu = torch.cuda.is_available()  # Unsloth's forward takes no positions there: all T logits
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
            kept = {} if on_gpu else {"logits_to_keep": positions}
            logits = self.model(**given, **kept, use_cache=False).logits[0]  # (T, V), or (N, V)
        places = positions if on_gpu else torch.arange(len(positions))
        loss = right = 0.0
        for at, label in zip(places.split(AT_ONCE), labels[positions].split(AT_ONCE), strict=True):
            guess = logits[at].float()  # never all of them: they would be there twice
            loss += float(torch.nn.functional.cross_entropy(guess, label, reduction="sum"))
            right += float((guess.argmax(-1) == label).sum())
        return loss, right, len(positions)


def _laid_out(job: "Job", rows: list[Encoded]) -> list[MicroBatch]:
    """Packs of one full row at most: a GPU computes the logits of every token of them. Else each row by itself."""
    if not job.data.packed:
        return [_alone(flat([row])) for row in rows]
    packs = sharing.plan(rows, job.config.model.max_length, job.data.least_shared)
    return [flat(rows, segments) for segments in packs]


def _alone(batch: MicroBatch) -> MicroBatch:
    return {name: array for name, array in batch.items() if name != "packed_seq_lengths"}


@dataclass(frozen=True)
class Problem:
    """What is asked (as a person reads it), the rendered prompt, and the answer of the data set."""

    question: str
    prompt: str
    reference: str


def problems_of(config: Config, tokenizer: Any, batches: Batches, warn: Callable[[str], None]) -> list[Problem]:
    """The first held-out conversations, as many as are shown or scored; plain text rows have no question and are left
    out, and with a warning those whose question alone is longer than `model.max_length`. Raises DataError where one is
    to be scored and its reference holds no `#### N`.
    """
    template, problems, too_long = chat.template_of(tokenizer), list[Problem](), 0
    source, rows = _held_out(config, batches)
    form, columns = "", dict[str, str]()
    for place, row in rows:
        if not form:
            form, columns = load.form_by(config, source, row, place)
        try:
            conversation = formats.convert(formats.rename(row, columns, place), form, place)
            if isinstance(conversation, str) or not conversation.answers:
                continue
            messages, last = conversation.messages, conversation.answers[-1]
            prompt = template.prompt(messages[:last], conversation.tools)
        except formats.Unusable:
            continue
        formats.check_text(prompt, place)
        question, reference = (messages[at]["content"] or "" for at in (last - 1, last))
        if len(problems) < config.eval.problems and arithmetic.final_number(reference) is None:
            raise DataError(
                f"eval.problems: {place}: its answer holds no `#### N`, so none can be checked; set eval.problems=0"
            )
        if len(tokenizer(prompt, add_special_tokens=False).input_ids) > config.model.max_length:
            too_long += 1
            continue
        problems.append(Problem(question, prompt, reference))
    if form == "text":
        warn("no sample is shown and no problem asked: held-out rows of plain text have no question")
    if too_long:
        most = f"model.max_length={config.model.max_length}"
        warn(f"{too_long} of the held-out problems are not asked: longer than {most}")
    return problems


def _held_out(config: Config, batches: Batches) -> tuple[str, Iterator[tuple[str, Row]]]:
    """(source, (place, row) …): the first of data.eval, or of what data.eval_share holds out of the first data set."""
    data, count = config.data, max(config.samples, config.eval.problems)
    if not count:
        return "", iter(())
    more = (data.streaming, data.columns.values(), data.documents)
    if data.eval is not None:
        rows = sources.first_rows(data.eval, "test", data.held_out_split, count, *more)
        return data.eval, ((place, row) for _, place, row in rows)
    part, held_out = batches.parts[0], batches.split[0][1]
    wanted = set(part.numbers[held_out[:count]].tolist())
    rows = sources.first_rows(part.source, "train", data.split, max(wanted, default=0), *more)
    return part.source, ((place, row) for number, place, row in rows if number in wanted)


def answer(job: "Job", problems: list[Problem], progress: Progress = lambda what, share: None) -> list[str]:
    """The model's greedy answers, each at most half as long again as the longest reference (and 16 tokens more).

    The ranks share the problems. The model is left ready for training. `progress` is told what is done, 0 to 1.
    """
    if not problems:
        return []
    longest = max(map(len, job.tokenizer([problem.reference for problem in problems]).input_ids))
    room = min(max(longest + longest // 2 + 16, LEAST_NEW_TOKENS), MOST_NEW_TOKENS)
    rank, size, own = job.ranks.rank, job.ranks.size, None
    try:
        own = _answer(job, problems[rank::size], room, progress)
    finally:
        found = job.ranks.gather(own)  # None of one that a signal ended: the others would wait for it
    if None in found:
        raise KeyboardInterrupt(signal.SIGINT)
    return [found[at % size][at // size] for at in range(len(problems))]


def _answer(job: "Job", problems: list[Problem], room: int, progress: Progress) -> list[str]:
    model, tokenizer = job.model, job.tokenizer
    models.for_inference(model)
    texts, stops = [], decoding.stop_ids(model, tokenizer)
    what = f"answering {len(problems)} held-out problems"
    progress(what, 0.0)
    for start in range(0, len(problems), ROWS_AT_ONCE):
        prompts = [problem.prompt for problem in problems[start : start + ROWS_AT_ONCE]]

        def told(tokens: int, before: int = start, rows: int = len(prompts)) -> None:
            progress(what, min((before + rows * tokens / room) / len(problems), 0.99))

        ids = decoding.generate(model, tokenizer, prompts, stops, room, told)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    progress(what, 1.0)
    models.for_training(model, job.plan.gradient_checkpointing)
    return texts


def to_show(answered: list[Sample], count: int) -> list[Sample]:
    """The first ones, in their order; of two and more one is right and one wrong, where there are such."""
    marks = [each.after_right for each in answered]
    first = [marks.index(kind) for kind in (True, False) if kind in marks] if count > 1 else []
    chosen = [*first, *(at for at in range(len(answered)) if at not in first)][:count]
    return [answered[at] for at in sorted(chosen)]


def _sample(problem: Problem, before: str, after: str) -> Sample:
    marks = (arithmetic.is_right(text, problem.reference) for text in (before, after))
    known = arithmetic.final_number(problem.reference) is not None
    return Sample(problem.question, problem.reference, before, after, *(mark if known else None for mark in marks))


def compare(
    config: Config, problems: list[Problem], before: list[str], after: list[str]
) -> tuple[list[Sample], ExactMatch | None]:
    """(the samples to show, the exact match on the first `eval.problems`; None where none were asked for)."""
    answered = [_sample(problem, old, new) for problem, old, new in zip(problems, before, after, strict=True)]
    shown = to_show(answered, config.samples)
    count = min(config.eval.problems, len(problems))
    if not count:
        return shown, None
    references = [problem.reference for problem in problems[:count]]
    then, now = (arithmetic.accuracy(texts[:count], references) for texts in (before, after))
    return shown, ExactMatch(count, then or 0.0, now or 0.0)
