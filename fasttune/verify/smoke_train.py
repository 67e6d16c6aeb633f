"""Two steps of the real `fasttune train` on builtin:tiny, then a look at what they changed, wrote and connected to.

The command runs in a process that is watched from inside, as `coverage run` watches one:
`python -m fasttune.verify.smoke_train REPORT MODULE ARGUMENT…`.
"""

import importlib
import json
import math
import runpy
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttune import child_process
from fasttune.verify import Result, judged
from fasttune.verify.error_hints import from_exit

STEPS = 2
LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


def train() -> Iterator[Result]:
    """One run, four answers. Everything it writes, its caches too, goes to a folder that is removed."""
    with tempfile.TemporaryDirectory() as temporary:
        root, token = Path(temporary), "hf_" + secrets.token_hex(17)
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
    environment = {k: v for k, v in child_process.environment().items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
    environment |= {
        "HF_TOKEN": token,
        "HF_HOME": str(root / "cache/huggingface"),
        "FASTTUNE_CACHE": str(root / "cache/fasttune"),
        "TMPDIR": str(root / "tmp"),
    }
    watched = ("fasttune.cli", "train", str(root / "verify.yaml"))
    command = child_process.command("fasttune.verify.smoke_train", str(root / "seen.json"), *watched)
    return subprocess.run(command, cwd=root / "cwd", env=environment, capture_output=True, text=True, timeout=400)


# -- what the run left


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
        seen = read_seen(root)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        what = f"{type(error).__name__}: {error}"
        return Result(name, "fail", f"`fasttune train` left an incomplete output folder: {what}")
    trainable, changed = set(seen.get("trainable", ())), set(seen.get("changed", ()))
    unchanged, wrongly = trainable - changed, sorted(changed - trainable)
    problems = []
    if record["status"] != "completed" or len(losses) != STEPS:
        problems.append(f"status {record['status']} after {len(losses)} of {STEPS} steps")
    if not all(map(math.isfinite, losses)):
        problems.append("the loss is not finite")
    if "changed" not in seen:
        problems.append("no transformers Trainer was seen: what the run trained is unknown")
    elif unchanged or not trainable:
        problems.append(f"{len(unchanged)} of {len(trainable)} adapter tensors did not change")
    if wrongly:
        problems.append(f"{len(wrongly)} frozen tensors changed, {wrongly[0]} first")
    if not saved or not all("lora_" in tensor for tensor in saved):
        problems.append("adapter_model.safetensors does not hold exactly the LoRA weights")
    if problems:
        return judged(name, False, "; ".join(problems), reinstall=("transformers", "peft", "trl", "unsloth"))
    backend = record.get("backend", {})
    ran = ", ".join(f"{key} {backend[key]}" for key in ("attention", "dtype") if key in backend)
    detail = f"loss {' → '.join(f'{loss:.3f}' for loss in losses)}; {len(changed)} of {len(trainable)} adapter tensors "
    detail += f"changed, {seen['parameters'] - len(trainable)} frozen ones did not; "
    return Result(name, "pass", f"{detail}ran {backend.get('library', '?')}: {ran}")


def judge_connections(root: Path) -> Result:
    try:
        hosts = sorted(set(read_seen(root)["connections"]))
    except (OSError, ValueError, KeyError) as error:
        return Result("privacy-network", "fail", f"the run was not watched: {type(error).__name__}: {error}")
    said = f"training a local model tried to reach {', '.join(hosts)}"
    good = "`fasttune train` tried no connection (Python sockets, offline mode off)"
    return judged("privacy-network", not hosts, said if hosts else good)


def judge_token(root: Path, token: str, printed: str) -> Result:
    """The made-up HF_TOKEN must be in nothing that was written or printed."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    found = [str(path.relative_to(root)) for path in files if token.encode() in path.read_bytes()]
    found += ["its output"] if token in printed else []
    said = f"HF_TOKEN can be read in {', '.join(found[:5])}"
    good = f"a made-up HF_TOKEN is in none of the {len(files)} files written, nor in the output"
    return judged("privacy-token", not found, said if found else good)


def judge_current_folder(root: Path) -> Result:
    left = sorted(path.name for path in (root / "cwd").iterdir())
    return judged("privacy-folder", not left, f"training left {', '.join(left[:5]) or 'nothing'} in the current folder")


def read_seen(root: Path) -> dict[str, Any]:
    seen: dict[str, Any] = json.loads((root / "seen.json").read_text(encoding="utf-8"))
    return seen


CHECKS = {"train-two-steps": train}

# -- the process that is watched from inside


def block_network(attempts: list[str]) -> None:
    """From now on look-ups and connections beyond this machine fail with OSError; `attempts` gets the host of each.

    Python's audit hooks see every Python socket, and also those of forked children (which append to their own copy,
    but are blocked all the same). A native library with its own sockets is not seen.
    Source: https://docs.python.org/3/library/audit_events.html
    """

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.getaddrinfo", "socket.gethostbyname"):
            host = arguments[0]
        elif event in ("socket.connect", "socket.sendto"):
            sock, address = arguments
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                return
            host = address[0]
        else:
            return
        host = host.decode() if isinstance(host, bytes) else str(host or "localhost")
        if not host.startswith(LOOPBACK):
            attempts.append(host)
            raise OSError(f"fasttune verify blocks the network: {host}")

    sys.addaudithook(hook)


def watch_weights(seen: dict[str, Any]) -> None:
    """Every transformers.Trainer made from now on records its model's parameters before and after training."""
    importlib.import_module("fasttune.core.model")  # unsloth first: it patches transformers
    import torch
    from transformers import TrainerCallback, trainer

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen["trainable"] = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            self.before = {name: value.detach().cpu().clone() for name, value in model.named_parameters()}

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            after = dict(model.named_parameters())
            same = {name for name, was in self.before.items() if name in after and torch.equal(was, after[name].cpu())}
            seen["changed"] = [name for name in self.before if name not in same]
            seen["parameters"] = len(after)

    trainer.DEFAULT_CALLBACKS.append(Watch)  # type: ignore[arg-type]


def run_watched(report: str, module: str) -> None:
    """Run a module as `python -m` does; `report` (JSON) gets connections tried, and which parameters were trainable
    and which changed."""
    seen: dict[str, Any] = {"connections": []}
    block_network(seen["connections"])
    try:
        watch_weights(seen)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        Path(report).write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    _, report, module, *arguments = sys.argv
    sys.argv[1:] = arguments
    run_watched(report, module)
