"""A resumed run with lora.init=pissa or olora: the base weights, split by the adapter that it began with."""

from pathlib import Path
from typing import Any

import torch

from fasttune.errors import ModelError, first_line


@torch.no_grad()
def split_again(model: Any, start: Path, init: str) -> None:
    """What is left of the base weights, W - B·A, by an adapter that was saved; in fp32, to the bits of the first time:
    PiSSA as Unsloth computes it, OLoRA as PEFT.
    """
    from peft.utils import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if start.is_symlink() or not start.is_file():
            raise ValueError("it is no file")
        if unknown := set_peft_model_state_dict(model, load_file(start)).unexpected_keys:
            raise ValueError(f"{unknown[0]} is of another model")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"--resume: {start} does not hold ({first_line(error)[:100]}); start over") from error
    model.peft_config["default"].init_lora_weights = init
    for layer in model.modules():
        if "default" in getattr(layer, "lora_A", {}):
            weight, b, a = layer.get_base_layer().weight, layer.lora_B["default"].weight, layer.lora_A["default"].weight
            scale, residual = layer.scaling["default"], weight.float().clone()
            residual = residual.sub_(scale * b @ a) if init == "olora" else residual.addmm_(b, a, alpha=-scale)
            weight.data = residual.to(weight.dtype)
