"""AdamW as a Hugging Face trainer does not make it by itself: two learning rates for an adapter, or bf16 weights that
are rounded by chance. Loaded only where a run asks for one.
"""

from typing import TYPE_CHECKING, Any

import torch

from fasttune.core.memory import STOCHASTIC_ADAMW

if TYPE_CHECKING:
    import trl


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
