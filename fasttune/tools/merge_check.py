"""Does a merged model answer as base + adapter does? A program of its own: plain transformers and PEFT.

python -m fasttune.tools.merge_check MERGED '{"base": …, "revision": …, "adapter": …, "trust_remote_code": false}'
Prints one line of JSON (Comparison).
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fasttune.data import chat
from fasttune.data.formats import Unusable

# Allowed share of the largest logit. fp32: the same products in another order. Below: each weight is rounded once
# (by up to 2^-12, 2^-9 of it) and the roundings of all layers add up: 1.1 % in bf16 with SmolLM2's 30 layers.
TOLERANCES = {"float32": 2.0**-13, "float16": 2.0**-8, "bfloat16": 2.0**-5}
TEXTS = [
    "What is 17 + 25?",
    "The capital of France is",
    "def add(a, b):\n    return",
    "Once upon a time, on a cold morning in winter, 3 old friends met at the river and",
]
HEADROOM = 1.3  # of the weights' size, for one forward pass


@dataclass(frozen=True)
class Comparison:
    """Of the logits at every position of TEXTS, computed in `computed_in` on both sides."""

    written_in: str
    computed_in: str
    positions: int
    largest_difference: float
    tolerance: float
    adapter_effect: float  # largest difference between base + adapter and the base alone
    same_choice: float  # share of positions with the same most likely token
    missing: list[str]  # weights that transformers asked for and the merged files lack
    seen: bool  # the adapter changes more than the merge may: a missing or wrong one would have shown

    @property
    def verified(self) -> bool:
        return not self.missing and self.largest_difference <= self.tolerance


def compare(merged: str, base: str, revision: str | None, adapter: str | None, trust_remote_code: bool) -> Comparison:
    """Load one after the other, so that one model at a time is in memory."""
    import peft
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    trust = {"trust_remote_code": trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(merged, **trust)
    written = str(config.dtype or torch.float32).removeprefix("torch.")
    device, computed = _where(merged, written)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged, **trust)
    ids = [tokenizer(text, return_tensors="pt").input_ids.to(device) for text in texts(tokenizer)]

    def load(name: str, **more: Any) -> tuple[Any, dict[str, Any]]:
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, computed), output_loading_info=True, **trust, **more
        )
        return model.to(device), told

    def logits(model: Any) -> Any:
        with torch.inference_mode():
            return torch.cat([model.eval()(input_ids=one).logits[0].float().cpu() for one in ids])  # (all T, V)

    model, told = load(merged)
    found, rows = logits(model), len(model.get_input_embeddings().weight)
    del model
    model, _ = load(base, revision=revision)
    if len(model.get_input_embeddings().weight) != rows:
        model.resize_token_embeddings(rows)
    alone = logits(model)
    wanted = logits(peft.PeftModel.from_pretrained(model, adapter)) if adapter else alone
    difference, effect = ((one - wanted).abs().max().item() for one in (found, alone))
    return Comparison(
        written_in=written,
        computed_in=computed,
        positions=len(wanted),
        largest_difference=difference,
        tolerance=TOLERANCES[written] * wanted.abs().max().item(),
        adapter_effect=effect,
        same_choice=(found.argmax(-1) == wanted.argmax(-1)).float().mean().item(),
        missing=sorted(told["missing_keys"]),
        seen=effect > 2 * difference,
    )


def texts(tokenizer: Any) -> list[str]:
    """TEXTS as they are and, where there is a chat template that takes them, as turns."""
    if not tokenizer.chat_template:
        return TEXTS
    template = chat.template_of(tokenizer)
    try:
        return TEXTS + [template.render([{"role": "user", "content": text}], ask=True) for text in TEXTS]
    except Unusable:
        return TEXTS


def _where(merged: str, written: str) -> tuple[str, str]:
    """(device, dtype): float32 where it fits, so that only the rounding of the weights is compared.

    The CPU where the GPU cannot hold the whole model.
    """
    import psutil
    import torch

    size = HEADROOM * sum(path.stat().st_size for path in Path(merged).glob("*.safetensors"))
    in_float32 = size if written == "float32" else 2 * size
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    device = "cuda" if size < free else "cpu"
    free = free if device == "cuda" else psutil.virtual_memory().available
    return device, "float32" if in_float32 < free else written


if __name__ == "__main__":
    print(json.dumps(asdict(compare(sys.argv[1], **json.loads(sys.argv[2])))))
