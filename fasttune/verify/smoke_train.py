"""Two steps of the real `fasttune train` on builtin:tiny, then a look at what they changed, wrote and connected to."""

import json
import math
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttune import system
from fasttune.verify import Result, install_command
from fasttune.verify.error_hints import from_exit

STEPS = 2


def train() -> Iterator[Result]:
    """One run, four answers. Everything it writes, its caches too, goes to a folder that is removed."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        token = "hf_" + secrets.token_hex(17)
        ended = run(root, token)
        printed = ended.stdout + ended.stderr
        trained = judge_training(root, ended.returncode, printed)
        yield trained
        for seen in (judge_connections(root), judge_token(root, token, printed), judge_current_folder(root)):
            if trained.status == "fail" and seen.status == "pass":  # what never ran cannot have leaked
                seen = Result(seen.name, "skip", "needs train-two-steps, which failed")
            yield seen


def run(root: Path, token: str) -> subprocess.CompletedProcess[str]:
    """`fasttune train` in root/cwd, output in root/run, caches in root, and a made-up HF_TOKEN in its environment."""
    config = {
        "name": "verify",
        "output_dir": str(root / "run"),
        "model": {"name": "builtin:tiny", "max_length": 512},
        "data": {"train": "builtin:arithmetic", "max_rows": 8},
        "train": {"max_steps": STEPS, "batch_rows": 2, "learning_rate": 0.01},
    }
    (root / "verify.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    for name in ("cwd", "cache", "tmp"):
        (root / name).mkdir()
    environment = {k: v for k, v in system.child_environment().items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
    environment |= {
        "HF_TOKEN": token,
        "HF_HOME": str(root / "cache/huggingface"),
        "FASTTUNE_CACHE": str(root / "cache/fasttune"),
        "TMPDIR": str(root / "tmp"),
    }
    command = system.child_command(
        "fasttune.verify.probe", str(root / "probe.json"), "train", str(root / "verify.yaml")
    )
    return subprocess.run(command, cwd=root / "cwd", env=environment, capture_output=True, text=True, timeout=400)


def judge_training(root: Path, returncode: int, printed: str) -> Result:
    """Loss finite at every step, every trainable parameter changed, no frozen one, the adapter on disk is LoRA only."""
    name = "train-two-steps"
    if returncode:
        result = from_exit(name, returncode, printed, "trl")
        result.detail = f"`fasttune train` on builtin:tiny: {result.detail}"
        return result
    from safetensors import SafetensorError, safe_open

    try:
        record = json.loads((root / "run/run.json").read_text(encoding="utf-8"))
        lines = (root / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [float(json.loads(line)["loss"]) for line in lines]
        with safe_open(root / "run/adapter/adapter_model.safetensors", "numpy") as adapter:
            saved = list(adapter.keys())
        probe = read_probe(root)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return Result(
            name, "fail", f"`fasttune train` left an incomplete output folder: {type(error).__name__}: {error}"
        )
    problems = []
    if record["status"] != "completed" or len(losses) != STEPS:
        problems.append(f"status {record['status']} after {len(losses)} of {STEPS} steps")
    if not all(math.isfinite(loss) for loss in losses):
        problems.append("the loss is not finite")
    if "changed" not in probe:
        problems.append("no transformers Trainer was seen: what the run trained is unknown")
    else:
        trainable, changed = set(probe["trainable"]), set(probe["changed"])
        if not trainable or trainable - changed:
            problems.append(f"{len(trainable - changed)} of {len(trainable)} adapter tensors did not change")
        if changed - trainable:
            problems.append(
                f"{len(changed - trainable)} frozen tensors changed, {sorted(changed - trainable)[0]} first"
            )
    if not saved or not all("lora_" in tensor for tensor in saved):
        problems.append("adapter_model.safetensors does not hold exactly the LoRA weights")
    if problems:
        return Result(name, "fail", "; ".join(problems), install_command("transformers", "peft", "trl", "unsloth"))
    frozen = probe["parameters"] - len(trainable)
    detail = f"loss {' → '.join(f'{loss:.3f}' for loss in losses)}; {len(changed)} of {len(trainable)} adapter tensors "
    backend = record.get("backend", {})
    ran = ", ".join(f"{key} {backend[key]}" for key in ("attention", "dtype") if key in backend)
    return Result(
        name, "pass", f"{detail}changed, {frozen} frozen ones did not; ran {backend.get('library', '?')}: {ran}"
    )


def judge_connections(root: Path) -> Result:
    try:
        hosts = sorted(set(read_probe(root)["connections"]))
    except (OSError, ValueError, KeyError) as error:
        return Result("privacy-network", "fail", f"the run was not watched: {type(error).__name__}: {error}")
    if hosts:
        return Result("privacy-network", "fail", f"training a local model tried to reach {', '.join(hosts)}")
    return Result("privacy-network", "pass", "`fasttune train` tried no connection (Python sockets, offline mode off)")


def judge_token(root: Path, token: str, printed: str) -> Result:
    """The made-up HF_TOKEN must be in nothing that was written or printed."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    found = [str(path.relative_to(root)) for path in files if token.encode() in path.read_bytes()]
    found += ["its output"] if token in printed else []
    if found:
        return Result("privacy-token", "fail", f"HF_TOKEN can be read in {', '.join(found[:5])}")
    return Result(
        "privacy-token", "pass", f"a made-up HF_TOKEN is in none of the {len(files)} files written, nor in the output"
    )


def judge_current_folder(root: Path) -> Result:
    left = sorted(path.name for path in (root / "cwd").iterdir())
    if left:
        return Result("privacy-folder", "fail", f"training left {', '.join(left[:5])} in the current folder")
    return Result("privacy-folder", "pass", "training left nothing in the current folder")


def read_probe(root: Path) -> dict[str, Any]:
    probe: dict[str, Any] = json.loads((root / "probe.json").read_text(encoding="utf-8"))
    return probe


CHECKS = {"train-two-steps": train}
