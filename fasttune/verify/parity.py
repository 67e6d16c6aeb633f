"""Unsloth itself: the import and its order, the model against plain transformers + PEFT, and its usage statistics.

One process for all of it, since importing unsloth takes about ten seconds. The plain side is another one
(`python -m fasttune.verify.parity FOLDER`), because unsloth patches transformers for the whole process.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttune import child_process
from fasttune.verify import Result, judged
from fasttune.verify.error_hints import from_exit
from fasttune.verify.smoke_train import block_network

PATCHED_LATER = ("transformers", "trl", "peft")
RANK, ALPHA = 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
connections: list[str] = []  # tried since import_unsloth
imported: list[str] = []  # Unsloth's version, once it is there


def import_unsloth() -> Iterator[Result]:
    """Through fasttune.core.model, the package's one door to it. Blocks the network first: see `statistics`."""
    block_network(connections)
    order: list[str] = []  # of imports begun; sys.modules is in the order of imports ended
    sys.addaudithook(lambda event, arguments: order.append(str(arguments[0])) if event == "import" else None)
    import fasttune.core.model  # noqa: F401

    late = [name for name in PATCHED_LATER if name in order[: order.index("unsloth")]]
    unsloth, zoo = sys.modules["unsloth"], sys.modules["unsloth_zoo"]
    imported.append(unsloth.__version__)
    detail = f"{unsloth.__version__} with unsloth_zoo {zoo.__version__}"
    detail += (
        f", but {', '.join(late)} came first and stays unpatched" if late else f", before {', '.join(PATCHED_LATER)}"
    )
    yield judged("import:unsloth", not late, detail)


def parity() -> Iterator[Result]:
    """Loss, logits and LoRA gradients of the same weights, adapter and batch on both sides.

    Measured as max |difference| / max |plain float32|. float32 (CPU): same operations, other order of summation: 1e-5.
    bf16 (GPU): at most twice the error that plain bf16 itself has against plain float32, and never under one eps.
    """
    if not imported:
        yield Result("unsloth-parity", "skip", "needs import:unsloth, which failed")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command, clean = child_process.command("fasttune.verify.parity", temporary), child_process.environment()
        plain = subprocess.run(command, capture_output=True, text=True, timeout=300, env=clean)
        if plain.returncode:
            result = from_exit("unsloth-parity", plain.returncode, plain.stderr, "transformers")
            result.detail = f"plain transformers + PEFT: {result.detail}"
            yield result
            return
        from safetensors.torch import load_file

        from fasttune.core import model as models

        on_gpu = (folder / "bfloat16.safetensors").exists()
        reference = load_file(folder / "float32.safetensors")
        model, seen = unsloth_side(folder / "model", "bfloat16" if on_gpu else "float32", reference)
        rounding = compare(load_file(folder / "bfloat16.safetensors"), reference) if on_gpu else None
    layers = len(models.decoder_layers(model))
    yield judge_parity(compare(seen, reference), rounding, min(models.patched_layers(model).values()), layers)


def compare(got: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of `loss`, `logits` and `gradient`; KeyError if the two trained different parameters."""
    from fasttune.verify.attention import relative_error

    if got.keys() != reference.keys():
        raise KeyError(f"other trainable parameters: {sorted(got.keys() ^ reference.keys())[:4]}")
    errors = {"loss": 0.0, "logits": 0.0, "gradient": 0.0}
    for name, tensor in reference.items():
        kind = name.split(".")[0]
        if kind in errors:
            errors[kind] = max(errors[kind], relative_error(got[name], tensor))
    return errors


def judge_parity(errors: dict[str, float], rounding: dict[str, float] | None, patched: int, layers: int) -> Result:
    """`rounding` is plain bf16's own error on a GPU, None for float32 on the CPU."""
    eps = 2.0**-7  # bfloat16
    limits = {kind: 1e-5 if rounding is None else max(eps, 2 * rounding[kind]) for kind in errors}
    parts = [f"{kind} {errors[kind]:.1e} (limit {limits[kind]:.0e})" for kind in errors]
    dtype = "bfloat16" if rounding else "float32"
    detail = f"{dtype}, max error: {', '.join(parts)}; Unsloth patched {patched} of {layers} layers"
    if not rounding and not patched:
        detail += " (its CPU backend is stock transformers)"
    right = all(errors[kind] <= limits[kind] for kind in errors)
    reinstall = ("unsloth", "unsloth-zoo") if right else ("transformers", "peft", "unsloth", "unsloth-zoo")
    return judged("unsloth-parity", right and (not rounding or patched == layers), detail, reinstall=reinstall)


def statistics() -> Iterator[Result]:
    """Unsloth's own switch, and every connection tried while it was imported, loaded and run.

    runner.py takes UNSLOTH_DISABLE_STATISTICS and the offline variables out of this process's environment, so what is
    seen here is what fasttune.core.model does by itself. What Unsloth sends begins with a connection from this process
    (has_internet in unsloth/models/_utils.py), so the guard sees it, and it ends there.
    """
    if not imported:
        yield Result("privacy-statistics", "skip", "needs import:unsloth, which failed")
        return
    problems = []
    if "UNSLOTH_DISABLE_STATISTICS" not in os.environ:
        problems.append("fasttune.core.model did not set UNSLOTH_DISABLE_STATISTICS")
    if connections:
        problems.append(f"connections tried: {', '.join(sorted(set(connections)))}")
    detail = "; ".join(problems) or "no connection tried during import, load, forward and backward"
    yield judged("privacy-statistics", not problems, detail)


CHECKS = {"import:unsloth": import_unsloth, "unsloth-parity": parity, "privacy-statistics": statistics}

# -- the two sides


def unsloth_side(folder: Path, dtype: str, reference: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from fasttune.core import model as models
    from fasttune.settings import LoraConfig, ModelConfig

    config = ModelConfig.model_validate({"name": str(folder), "max_length": 64})
    lora = LoraConfig.model_validate({"rank": RANK, "alpha": ALPHA, "targets": TARGETS})
    model, _ = models.load(config, dtype, "none", full=False, seed=0)
    model = models.add_lora(model, lora, "none", seed=0)
    for name, parameter in trainable(model):
        parameter.data.copy_(reference[f"adapter.{name}"])
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    return model, forward_backward(model)


def plain_side(folder: Path) -> None:
    """Writes `folder`/model (weights, tokenizer) and `folder`/DTYPE.safetensors, as `forward_backward` gives it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from fasttune.verify.attention import DEVICE

    write_model(folder / "model")
    for dtype in ("float32", "bfloat16") if DEVICE == "cuda" else ("float32",):
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype)).to(DEVICE)
        model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0))
        generator = torch.Generator().manual_seed(2)
        for _, parameter in sorted(trainable(model)):  # LoRA's B starts at zero, and A would get no gradient
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        save_file(forward_backward(model), folder / f"{dtype}.safetensors")


def write_model(folder: Path) -> None:
    """Two layers of random weights under Llama 3.1's shape: grouped-query attention and five-field rope scaling."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fasttune.core import pretrained
    from fasttune.verify.attention import llama31

    tokenizer = AutoTokenizer.from_pretrained(pretrained.builtin("builtin:tiny"))
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "initializer_range": 0.05}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **shape, **heads, **llama31(), **special)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def trainable(model: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def forward_backward(model: Any) -> dict[str, Any]:
    """`loss`, `logits`, and of every trainable parameter `adapter.NAME` and `gradient.NAME`: float32, on the CPU.

    The batch is (B=2, T=48); the first 8 labels of a row are -100, as a prompt's are. bf16 runs under autocast.
    """
    import torch

    from fasttune.verify.attention import DEVICE

    ids = torch.randint(3, 250, (2, 48), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels = ids.clone()
    labels[:, :8] = -100
    model.train()
    half = next(model.parameters()).dtype == torch.bfloat16
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=half):
        logits = model(input_ids=ids).logits
    seen = {"loss": loss.detach().reshape(1), "logits": logits}
    for name, parameter in trainable(model):
        seen[f"adapter.{name}"] = parameter.detach()
        seen[f"gradient.{name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return {name: tensor.float().cpu().contiguous() for name, tensor in seen.items()}


if __name__ == "__main__":
    plain_side(Path(sys.argv[1]))
