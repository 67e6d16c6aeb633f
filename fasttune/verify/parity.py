"""Unsloth itself: the import and its order, the model against plain transformers + PEFT, and its usage statistics.

One process for all of it, since importing unsloth takes about ten seconds.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttune import system
from fasttune.verify import Result, install_command
from fasttune.verify.error_hints import from_exit
from fasttune.verify.guard import block_network

PATCHED_LATER = ("transformers", "trl", "peft")
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
    if late:
        yield Result("import:unsloth", "fail", f"{detail}, but {', '.join(late)} came first and stays unpatched")
    else:
        yield Result("import:unsloth", "pass", f"{detail}, before {', '.join(PATCHED_LATER)}")


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
        command, clean = system.child_command("fasttune.verify.plain", temporary), system.child_environment()
        plain = subprocess.run(command, capture_output=True, text=True, timeout=300, env=clean)
        if plain.returncode:
            result = from_exit("unsloth-parity", plain.returncode, plain.stderr, "transformers")
            result.detail = f"plain transformers + PEFT: {result.detail}"
            yield result
            return
        from safetensors.torch import load_file

        from fasttune.core import model as models
        from fasttune.verify.kernels import DEVICE

        dtype = "bfloat16" if DEVICE == "cuda" else "float32"
        reference = load_file(folder / "float32.safetensors")
        model, seen = _unsloth_side(folder / "model", dtype, reference)
        rounding = compare(load_file(folder / "bfloat16.safetensors"), reference) if dtype == "bfloat16" else None
    layers = len(models.decoder_layers(model))
    yield judge(compare(seen, reference), rounding, min(models.patched_layers(model).values()), layers)


def _unsloth_side(folder: Path, dtype: str, reference: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import torch

    from fasttune.config import LoraConfig, ModelConfig
    from fasttune.core import model as models
    from fasttune.verify import plain

    config = ModelConfig.model_validate({"name": str(folder), "max_length": 64})
    lora = LoraConfig.model_validate({"rank": plain.RANK, "alpha": plain.ALPHA, "targets": plain.TARGETS})
    model, _ = models.load(config, dtype, "none", full=False, seed=0)
    model = models.add_lora(model, lora, "none", seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(reference[f"adapter.{name}"])
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    return model, plain.run(model)


def compare(got: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of `loss`, `logits` and `gradient`; KeyError if the two trained different parameters."""
    from fasttune.verify.kernels import relative_error

    if got.keys() != reference.keys():
        raise KeyError(f"other trainable parameters: {sorted(got.keys() ^ reference.keys())[:4]}")
    errors = {"loss": 0.0, "logits": 0.0, "gradient": 0.0}
    for name, tensor in reference.items():
        kind = name.split(".")[0]
        if kind in errors:
            errors[kind] = max(errors[kind], relative_error(got[name], tensor))
    return errors


def judge(errors: dict[str, float], rounding: dict[str, float] | None, patched: int, layers: int) -> Result:
    """`rounding` is plain bf16's own error on a GPU, None for float32 on the CPU."""
    eps = 2.0**-7  # bfloat16
    limits = {kind: 1e-5 if rounding is None else max(eps, 2 * rounding[kind]) for kind in errors}
    parts = [f"{kind} {errors[kind]:.1e} (limit {limits[kind]:.0e})" for kind in errors]
    dtype = "bfloat16" if rounding else "float32"
    detail = f"{dtype}, max error: {', '.join(parts)}; Unsloth patched {patched} of {layers} layers"
    if not rounding and not patched:
        detail += " (its CPU backend is stock transformers)"
    if any(not errors[kind] <= limits[kind] for kind in errors):
        return Result(
            "unsloth-parity", "fail", detail, install_command("transformers", "peft", "unsloth", "unsloth-zoo")
        )
    if rounding and patched < layers:
        return Result("unsloth-parity", "fail", detail, install_command("unsloth", "unsloth-zoo"))
    return Result("unsloth-parity", "pass", detail)


def statistics() -> Iterator[Result]:
    """Unsloth's own switch, and every connection tried while it was imported, loaded and run.

    verify.py takes UNSLOTH_DISABLE_STATISTICS and the offline variables out of this process's environment, so what is
    seen here is what fasttune.core.model does by itself. What Unsloth sends begins with a connection from this process
    (has_internet in unsloth/models/_utils.py), so the guard sees it, and it ends there.
    """
    name, problems = "privacy-statistics", []
    if not imported:
        yield Result(name, "skip", "needs import:unsloth, which failed")
        return
    if "UNSLOTH_DISABLE_STATISTICS" not in os.environ:
        problems.append("fasttune.core.model did not set UNSLOTH_DISABLE_STATISTICS")
    if connections:
        problems.append(f"connections tried: {', '.join(sorted(set(connections)))}")
    detail = "; ".join(problems) or "no connection tried during import, load, forward and backward"
    yield Result(name, "fail" if problems else "pass", detail)


CHECKS = {"import:unsloth": import_unsloth, "unsloth-parity": parity, "privacy-statistics": statistics}
