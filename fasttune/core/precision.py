"""How full fine-tuning in bf16 loses no small update. Pure, no torch.

A bf16 value has 8 significant bits: what changes it by less than about 1/400 of itself is rounded away, and so is most
of what AdamW does at the learning rates of full fine-tuning. So the weights are held in fp32, and computed with in bf16
(autocast); or, where only 8-bit moments fit, in bf16 with updates that are rounded up or down by chance, right on
average (torchao). Source: https://arxiv.org/abs/2010.06192
"""

BY_CHANCE = "adamw_torch_8bit"  # Hugging Face's name of torchao's optimizer


def masters(method: str, dtype: str, optimizer: str) -> bool:
    """Whether the trained weights are held in fp32 though bf16 is computed."""
    return method == "full" and dtype == "bfloat16" and optimizer != "adamw_8bit"


def by_chance(method: str, dtype: str, optimizer: str) -> bool:
    """Whether bf16 weights are trained, each update rounded up or down by chance."""
    return method == "full" and dtype == "bfloat16" and optimizer == "adamw_8bit"
