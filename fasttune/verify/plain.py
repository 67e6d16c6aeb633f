"""The other side of parity.py: a two-layer Llama 3.1 in plain transformers + PEFT, its loss, logits and gradients.

A process of its own (`python -m fasttune.verify.plain FOLDER`), because unsloth patches transformers for the whole
process. Writes FOLDER/model (weights, tokenizer) and FOLDER/DTYPE.safetensors with `loss`, `logits`,
`adapter.NAME` (the LoRA weights to use) and `gradient.NAME`.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from fasttune.verify.kernels import DEVICE, LLAMA31_ROPE

RANK, ALPHA = 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, labels), each (B=2, T=48); the first 8 labels of a row are -100, as a prompt's are."""
    ids = torch.randint(3, 250, (2, 48), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :8] = -100
    return ids.to(DEVICE), labels.to(DEVICE)


def write_model(folder: Path) -> None:
    """Random weights under Llama 3.1's shape: grouped-query attention and its five-field rope scaling."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fasttune.core import pretrained

    tokenizer = AutoTokenizer.from_pretrained(pretrained.builtin("builtin:tiny"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=dict(LLAMA31_ROPE),
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(model: Any) -> dict[str, torch.Tensor]:
    """Loss, logits and every trainable parameter's gradient, as float32 on the CPU; bf16 runs under autocast."""
    ids, labels = batch()
    model.train()
    with torch.autocast("cuda", torch.bfloat16, enabled=next(model.parameters()).dtype == torch.bfloat16):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    with (
        torch.no_grad(),
        torch.autocast("cuda", torch.bfloat16, enabled=next(model.parameters()).dtype == torch.bfloat16),
    ):
        logits = model(input_ids=ids).logits
    seen = {"loss": loss.detach().reshape(1), "logits": logits}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            seen[f"adapter.{name}"] = parameter.detach()
            seen[f"gradient.{name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return {name: tensor.float().cpu().contiguous() for name, tensor in seen.items()}


def main(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    write_model(folder / "model")
    for dtype in ("float32", "bfloat16") if DEVICE == "cuda" else ("float32",):
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype)).to(DEVICE)
        model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():  # LoRA's B starts at zero, and A would get no gradient
            for _, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        save_file(run(model), folder / f"{dtype}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
