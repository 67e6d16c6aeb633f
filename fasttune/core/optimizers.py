"""AdamW as a Hugging Face trainer does not make it by itself: two learning rates for an adapter, another one for
embeddings and head, or bf16 weights that are rounded by chance. Loaded only where a run asks for one.

Weight decay is on matrices: of an adapter, and of embeddings and head too; not on norms and biases (as
transformers.Trainer.get_decay_parameter_names has it).
"""

from typing import TYPE_CHECKING, Any

import torch

from fasttune.config import Config
from fasttune.core import embeddings
from fasttune.core.memory import STOCHASTIC_ADAMW

if TYPE_CHECKING:
    import trl


def put_into(trainer: Any, config: Config, by_chance: bool) -> None:
    """Let a Hugging Face trainer update the weights as the (resolved) config asks for. by_chance: of bf16 weights."""
    if by_chance:
        round_by_chance(trainer)
    if config.lora.plus_ratio:
        trainer.optimizer = lora_plus(trainer.model, config.lora.plus_ratio, trainer.args)
    if config.lora.train_embeddings:
        ends_apart(trainer, config.train.embedding_learning_rate or 0.0)


def ends_apart(trainer: Any, rate: float) -> None:
    """Embeddings and head, trained beside an adapter, get groups of their own in the optimizer that the trainer makes.

    rate: their highest learning rate; it follows the same curve. Source: unsloth.UnslothTrainer, in whose place
    MeasuredTrainer is.
    """
    optimizer = trainer.create_optimizer()
    own = {id(parameter) for parameter in embeddings.parameters(trainer.model)}
    for group in list(optimizer.param_groups):
        if ends := [parameter for parameter in group["params"] if id(parameter) in own]:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            optimizer.add_param_group({**group, "params": ends, "lr": rate})


def lora_plus(model: Any, ratio: float, arguments: "trl.SFTConfig") -> torch.optim.Optimizer:
    """The second matrix of every adapter learns `ratio` times as fast: https://arxiv.org/abs/2402.12354, by PEFT."""
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=arguments.learning_rate,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=arguments.weight_decay,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        fused=True,
    )


def round_by_chance(trainer: Any) -> None:
    """Let a Hugging Face trainer update bf16 weights by torchao's AdamW with 8-bit moments and stochastic rounding.

    Told so only now: on a CPU Unsloth takes any "8bit" of a config for bitsandbytes' and puts another in its place.
    """
    from transformers.training_args import OptimizerNames

    trainer.args.optim, trainer.args.optim_args = OptimizerNames(STOCHASTIC_ADAMW), "bf16_stochastic_round=True"
    if not torch.cuda.is_available():
        torch.compiler.set_stance("force_eager")  # torchao compiles its step, for which a CPU may have no compiler
