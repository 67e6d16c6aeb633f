"""TRL's SFTTrainer (as Unsloth patched it) with a stopwatch and counters: what a step really cost and what really ran.

Shapes: B rows of a micro-batch, T tokens of the longest row (or of the whole packed row).
"""

import math
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttune.core import model as fasttune_model  # first: it imports unsloth, which patches transformers and trl

import torch
import transformers
import trl
from datasets import Dataset

from fasttune.core import what_ran
from fasttune.core.autoconfig import trainer_settings
from fasttune.core.ranks import ALONE, Ranks
from fasttune.core.stops import Stops
from fasttune.core.what_ran import Watched, count_tokens, synchronize
from fasttune.data.batching import Batches
from fasttune.data.sharing import ON_HOST
from fasttune.data.tokenize import IGNORE
from fasttune.errors import RunFailed
from fasttune.metrics import StepMetrics

if TYPE_CHECKING:
    from fasttune.core.checkpoint import Keeper
    from fasttune.core.evaluation import Validator
    from fasttune.core.prepare import Job
    from fasttune.core.run_folder import Journal


class MeasuredTrainer(Watched, trl.SFTTrainer):
    """Counts tokens in the very tensors that are trained on, and computes fewer at once where memory runs out.

    To a Hugging Face trainer each batch is one optimizer step. Here such a "batch" is a list of micro-batches:
    StepCollator (step number → micro-batches of data/batching.py) → get_batch_samples (clock, counts) → training_step
    (forward and backward of each) → optimizer → StepRecorder (numbers, evaluation, checkpoint).
    """

    ranks: Ranks = ALONE
    counts: dict[str, int]  # of all ranks
    layout: str = "not seen"  # how the rows of the last step lay
    started: float = 0.0  # of the present step
    computing_s: float = 0.0  # of its forward and backward, on this rank
    step_loss: float = 0.0
    rows_at_once: int | None = None  # fewer than planned, since memory ran out
    first_step_done: float = 0.0
    peak_outside_gib: float | None = None  # of a GPU's memory before and between the steps

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimizer step and its supervised tokens: the loss is the mean over all of them.

        The step's clock starts before they are made.
        """
        synchronize()
        self.started = time.perf_counter()
        steps = [step for _, step in zip(range(num_batches), epoch_iterator, strict=False)]
        if not steps:
            return steps, None
        self._look_at([batch for step in steps for batch in step])
        return steps, torch.tensor(self.counts["loss_tokens"], device=device)

    def _look_at(self, micro_batches: list[dict[str, Any]]) -> None:
        micro_batches = [batch for batch in micro_batches if bool((batch["labels"] != IGNORE).any())]
        own = count_tokens(micro_batches)
        self.layout = what_ran.layout(micro_batches, own) + ("" if self.ranks.alone else f" of rank {self.ranks.rank}")
        totals = self.ranks.total(list(own.values()), f"making step {self.state.global_step + 1:,}")
        self.counts = dict(zip(own, map(int, totals), strict=True))

    def training_step(self, model: Any, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of every micro-batch of a step; returns their summed loss, of all ranks like gradients.

        Out of memory on any rank, once in a run: the same rows again, fewer at once on every rank.
        """
        if self.rows_at_once is not None:  # the data loader made this step ahead of time, with more rows at once
            inputs = self._made_again()
        loss = self._micro_steps(model, inputs, num_items_in_batch)
        if loss is None:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            loss = self._micro_steps(model, self._made_again(), num_items_in_batch)
            assert loss is not None, "a second time raises"
        self.ranks.add_gradients(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.step_loss = float(loss)
        return loss

    def _micro_steps(self, model: Any, inputs: list[dict[str, Any]], supervised: Any) -> torch.Tensor | None:
        """The loss of all ranks; None where memory ran out on one, and fewer rows at once are to be tried."""
        losses, error, begun = list[torch.Tensor](), None, time.perf_counter()
        self.ranks.begins(doing := f"forward and backward of step {self.state.global_step + 1:,}")
        try:
            losses = [self._micro_step(model, batch, supervised) for batch in inputs]
        except torch.OutOfMemoryError as caught:
            if self.ranks.parts > 1:  # the others wait for it in the middle of a layer
                raise
            error = caught.with_traceback(None)  # which holds the activations
        own = torch.stack(losses).sum() if losses else torch.zeros((), device=self.args.device)
        if not self.ranks.alone:
            synchronize()
            self.computing_s = time.perf_counter() - begun
        loss, failed = self.ranks.total([float(own), error is not None], f"the end of {doing}")
        if not failed:
            return own.new_tensor(loss)
        model.zero_grad(set_to_none=True)
        if self.rows_at_once is None and self._halve():
            return None
        raise error or torch.OutOfMemoryError("on another rank")

    def _halve(self) -> bool:
        """Half as many rows at once, and half again until the present step falls into more pieces; False: it cannot."""
        batches, step = self.data_collator.batches, self.state.global_step
        before = sum(map(len, batches.laid_out(step)))
        while batches.micro_rows > 1 and self.rows_at_once is None:
            batches.micro_rows //= 2
            if sum(map(len, batches.laid_out(step))) > before:
                self.rows_at_once = batches.micro_rows
        return self.rows_at_once is not None

    def _made_again(self) -> list[dict[str, Any]]:
        micro_batches = self.data_collator([{"step": self.state.global_step}])
        self._look_at(micro_batches)
        return micro_batches

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """To the device without waiting for it. Row lengths stay on the host."""
        if self.args.use_cpu and inputs.keys().isdisjoint(("attention_mask", "position_ids")):  # TRL's loss needs one
            inputs = inputs | {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}
        return {
            name: tensor if name in ON_HOST else tensor.to(self.args.device, non_blocking=True)
            for name, tensor in inputs.items()
        }

    def _micro_step(self, model: Any, batch: dict[str, Any], supervised: Any) -> torch.Tensor:
        return super().training_step(model, batch, supervised)


@dataclass
class StepCollator:
    """[{"step": i}] → the micro-batches of step i, as tensors."""

    batches: Batches

    def __call__(self, examples: list[dict[str, int]]) -> list[dict[str, torch.Tensor]]:
        (example,) = examples
        made = self.batches.micro_batches(example["step"])
        return [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in made]

    torch_call = __call__  # Unsloth looks for TRL's name


class StepRecorder(transformers.TrainerCallback):
    """After every step: its numbers into the journal, what is due (evaluation, checkpoint), and whether to stop.

    Leaves steps out that are not finite, and ends the run in order: a signal, max_hours, early_stopping_patience.
    """

    def __init__(
        self, trainer: MeasuredTrainer, journal: "Journal", validator: "Validator", keeper: "Keeper", stops: Stops
    ):
        self.job, self.trainer, self.journal = journal.job, trainer, journal
        self.validator, self.keeper = validator, keeper
        self.stops = stops
        self.seconds = self.peak_memory_gib = 0.0
        self.adapters: tuple[float | None, float | None] = (None, None)  # condition and balance, if looked at
        self.bad_in_a_row = 0
        self._rows_at_once: int | None = None
        self._asked_was_compared = False

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """What was loaded, proved or evaluated until now is in no step's peak memory.

        Dropout of several ranks: by seed, step and rank, for a checkpoint holds the random state of one.
        """
        if not (ranks := self.trainer.ranks).alone:
            place = (self.job.config.seed, self.trainer.state.global_step, ranks.rank)
            transformers.set_seed(zlib.crc32(repr(place).encode()))
        if (peak := what_ran.restart_peak()) is not None:
            self.trainer.peak_outside_gib = max(self.trainer.peak_outside_gib or 0.0, peak)

    on_train_end = on_step_begin

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Without gradients the optimizer changes nothing: weights and moments stay as they were."""
        ranks, found = self.trainer.ranks, (parameter.grad for parameter in model.parameters())
        gradients = [ranks.held(gradient) for gradient in found if gradient is not None]
        finite = math.isfinite(self.trainer.step_loss) and bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        finite = not ranks.any_of(not finite, f"the gradients of step {state.global_step + 1:,}")
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        if not finite:
            model.zero_grad(set_to_none=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.adapters, every = (None, None), self.job.config.lora.refactor_every
        if every and state.global_step % every == 0 and not self.bad_in_a_row:
            from fasttune.core import spectral

            self.adapters = spectral.after_step(self.trainer, self.journal)
        synchronize()
        now = time.perf_counter()
        self.seconds = now - self.trainer.started
        self.peak_memory_gib = what_ran.restart_peak() or what_ran.peak_memory_gib()
        self.trainer.first_step_done = self.trainer.first_step_done or now
        last = state.global_step == state.max_steps
        control.should_training_stop |= self.stops.after_step(self.trainer.computing_s, self.peak_memory_gib, last)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        counts, step = self.trainer.counts, state.global_step
        stopping = self.stops.agreed is not None  # then the time is short
        seen = self.validator.measure(step) if self.validator.due(step) and not stopping else None
        control.should_training_stop |= self.validator.ended_early is not None
        measured = StepMetrics(
            step=step,
            loss=float(logs["loss"]),
            learning_rate=float(logs["learning_rate"]),
            grad_norm=float(logs["grad_norm"]) if logs.get("grad_norm") is not None else None,
            seconds=self.seconds,
            tokens_per_s=counts["tokens"] / self.seconds,
            peak_memory_gib=self.peak_memory_gib,
            eval_loss=seen.loss if seen else None,
            eval_token_accuracy=seen.token_accuracy if seen else None,
            eval_exact_match=seen.exact_match if seen else None,
            straggler=self.stops.straggler,
            adapter_condition=self.adapters[0],
            adapter_balance=self.adapters[1],
            **counts,
        )
        self.journal.step(measured)
        self._warn_of_what_runs(step)
        if self.bad_in_a_row:
            self._not_applied(measured)
        if stopping or self.keeper.due(step):
            self.keeper.write(step)

    def _warn_of_what_runs(self, step: int) -> None:
        """Where that is not what was asked for, or not any more."""
        if not self._asked_was_compared:
            self._asked_was_compared = True
            for text in what_ran.broken_promises(self.job, self.trainer):
                self.journal.warn(text)
        if self.trainer.rows_at_once != self._rows_at_once:
            self._rows_at_once = self.trainer.rows_at_once
            self.journal.warn(
                f"out of memory at step {step}: from here on {self._rows_at_once} full rows at once; the batch stays "
                f"{self.job.config.train.batch_rows} rows, so the result does not change"
            )

    def _not_applied(self, step: StepMetrics) -> None:
        """A warning for a bad step. Raises RunFailed for too many in a row."""
        bad = "a gradient that is not finite" if math.isfinite(step.loss) else f"a loss of {step.loss}"
        rows = self.job.data.describe(step.step - 1)
        self.journal.warn(f"step {step.step} was not applied: {bad}; it had {rows}")
        if self.bad_in_a_row > self.job.config.train.max_bad_steps:
            raise RunFailed(
                f"{self.bad_in_a_row} steps in a row could not be applied, the last with {bad} on {rows}; "
                f"look at these rows, or lower train.learning_rate; {self.journal.kept}"
            )


def build(job: "Job", scratch: Path, done: int = 0) -> MeasuredTrainer:
    """The trainer of a prepared job whose first `done` steps are behind it. `scratch` is where TRL may write."""
    config, plan = job.config, job.plan
    job.ranks.apart(job.model)
    arguments = trl.SFTConfig(
        **trainer_settings(config, job.total_steps),
        output_dir=str(scratch),
        per_device_train_batch_size=1,  # one step: its micro-batches are the collator's
        gradient_accumulation_steps=1,
        optim=plan.optimizer,
        gradient_checkpointing=plan.gradient_checkpointing != "none",
        max_length=config.model.max_length,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        data_seed=config.seed,
        torch_empty_cache_steps=None,  # Unsloth's own 250 throws memory away that is asked for again at once
        router_aux_loss_coef=0.0,  # of experts: TRL's default adds it once a micro-batch, so it hangs on how rows lie
        use_cpu=not torch.cuda.is_available(),
    )
    sizes = job.model.config.get_text_config()
    router_loss = getattr(sizes, "router_aux_loss_coef", None)
    first = min(done, job.total_steps - 1)  # at least one step, even if all are done: trl looks at an example
    trainer = MeasuredTrainer(
        model=job.model,
        args=arguments,
        train_dataset=Dataset.from_dict({"step": range(first, job.total_steps)}),
        data_collator=StepCollator(job.data),
        processing_class=job.tokenizer,
    )
    if router_loss is not None:
        sizes.router_aux_loss_coef = router_loss  # TRL has written its own there, and it is saved with the model
    trainer.ranks = job.ranks
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.accelerator.device_placement = False  # a step's tokens are counted before they are moved (_prepare_inputs)
    if config.lora.plus_ratio or config.lora.train_embeddings or plan.stochastic_rounding:
        from fasttune.core import optimizers

        optimizers.put_into(trainer, config, plan.stochastic_rounding)
    if job.data.packed:
        fasttune_model.scope_packed_kernels(job.model, trainer)
    return trainer
