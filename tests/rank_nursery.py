"""Runs of several processes without their start: one process imports everything, and forks them as torchrun would.

As a program it reads jobs, a line of JSON each, and answers with the pids of the ranks and, when all have ended, with
their exit codes. `Nursery` is what tests talk to.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
GRACE_S = 20


@dataclass
class Ended:
    """codes: of waitpid, by rank. told: run.json."""

    codes: list[int]
    told: dict[str, Any]
    steps: list[dict[str, Any]]


class Nursery:
    def __init__(self, *modules: str) -> None:
        """modules: what else is imported before the ranks are forked."""
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": None}
        self._process = subprocess.Popen([sys.executable, __file__, *modules], text=True, bufsize=1, **pipes)

    def start(self, folder: Path, ranks: int, changes: dict[str, Any] | None = None, **job: Any) -> list[int]:
        """The pids of the ranks. job: resume, restarts, trick (of this file), timeout_s, divided."""
        assert self._process.stdin and self._process.stdout
        self._folder = folder
        line = json.dumps({"folder": str(folder), "ranks": ranks, "changes": changes or {}, **job})
        self._process.stdin.write(f"{line}\n")
        return list(json.loads(self._process.stdout.readline()))

    def end(self) -> Ended:
        assert self._process.stdout
        codes = json.loads(self._process.stdout.readline())
        path = self._folder / "metrics.jsonl"
        steps = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return Ended(codes, json.loads((self._folder / "run.json").read_text()), steps)

    def run(self, folder: Path, ranks: int, changes: dict[str, Any] | None = None, **job: Any) -> Ended:
        self.start(folder, ranks, changes, **job)
        return self.end()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout
        self._process.stdout.close()


# -- what is broken on purpose, in one rank or in all


def each_by_itself(rank: int) -> None:
    """Every rank takes the mean over its own supervised tokens."""
    from fasttune.core.trainer import MeasuredTrainer

    look = MeasuredTrainer._look_at

    def own(self: Any, micro_batches: Any) -> None:
        look(self, micro_batches)
        self.counts["loss_tokens"] = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)

    MeasuredTrainer._look_at = own  # type: ignore[method-assign]


def out_of_memory(rank: int) -> None:
    """Rank 1, in its second step, with more than 512 tokens at once."""
    import torch

    from fasttune.core.trainer import MeasuredTrainer

    step = MeasuredTrainer._micro_step

    def full(self: Any, model: Any, batch: Any, supervised: Any) -> Any:
        if rank == 1 and self.state.global_step == 1 and batch["input_ids"].numel() > 512:
            raise torch.OutOfMemoryError("no more")
        return step(self, model, batch, supervised)

    MeasuredTrainer._micro_step = full  # type: ignore[method-assign]


def not_finite(rank: int) -> None:
    """The gradients of rank 1 in its third step."""
    from fasttune.core.trainer import MeasuredTrainer

    step = MeasuredTrainer._micro_step

    def infinite(self: Any, model: Any, batch: Any, supervised: Any) -> Any:
        loss = step(self, model, batch, supervised)
        if rank == 1 and self.state.global_step == 2:
            next(p.grad for p in model.parameters() if p.grad is not None).fill_(float("inf"))
        return loss

    MeasuredTrainer._micro_step = infinite  # type: ignore[method-assign]


def hangs(rank: int) -> None:
    """Rank 1 in its third step."""
    import time

    from fasttune.core.trainer import MeasuredTrainer

    step = MeasuredTrainer._micro_step

    def hanging(self: Any, *arguments: Any) -> Any:
        if rank == 1 and self.state.global_step == 2:
            time.sleep(20)
        return step(self, *arguments)

    MeasuredTrainer._micro_step = hanging  # type: ignore[method-assign]


def raises(rank: int, step_number: int = 3) -> None:
    """Rank 1 in its third step."""
    from fasttune.core.trainer import MeasuredTrainer

    step = MeasuredTrainer._micro_step

    def raising(self: Any, *arguments: Any) -> Any:
        if rank == 1 and self.state.global_step == step_number - 1:
            raise RuntimeError("a bad cable")
        return step(self, *arguments)

    MeasuredTrainer._micro_step = raising  # type: ignore[method-assign]


def raises_at_once(rank: int) -> None:
    """Rank 1 in its first step."""
    raises(rank, 1)


def raises_in_the_sixth(rank: int) -> None:
    """Rank 1 in its sixth step."""
    raises(rank, 6)


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # no thread pool: this process forks
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # unsloth greets
    from datetime import timedelta

    import torch.distributed as dist

    import fasttune.core.model
    import fasttune.core.resume
    import fasttune.core.train
    import fasttune.core.trainer  # noqa: F401

    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()
    store: Any = None
    for line in sys.stdin:
        job = json.loads(line)
        if not job.get("restarts"):  # torchrun keeps it: those it starts again find what was said before
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        pids = []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                os._exit(exit_code(job, rank, store.port))
            pids.append(pid)
        print(json.dumps(pids), file=answers, flush=True)
        codes = waited_for(set(pids))
        print(json.dumps([codes[pid] for pid in pids]), file=answers, flush=True)


def exit_code(job: dict[str, Any], rank: int, port: int) -> int:
    """Of a rank of the job, as the command's."""
    from tiny_run import run

    from fasttune.core import ranks

    size = job["ranks"]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "FASTTUNE_RANK_TIMEOUT_S": job.get("timeout_s", 60)}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": job.get("restarts", 0)}
    os.environ |= {name: str(value) for name, value in place.items()}
    if job.get("divided"):
        os.environ["UNSLOTH_FSDP2"] = "1"
    if "trick" in job:
        globals()[job["trick"]](rank)
    try:
        result = run(Path(job["folder"]), job["changes"], bool(job.get("resume")), ranks=ranks.of_environment())
    except BaseException:
        traceback.print_exc()
        return 1
    return {"completed": 0, "interrupted": 143}.get(result.status, 1)


def waited_for(pids: set[int]) -> dict[int, int]:
    """The exit codes. As torchrun does: once one has failed the others are ended, with time to save."""
    codes: dict[int, int] = {}
    failed_s = 0.0
    while pids - set(codes):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] and not failed_s:
                failed_s = time.monotonic()
                ended(pids - set(codes), signal.SIGTERM)
            continue
        if failed_s and time.monotonic() - failed_s > GRACE_S:
            ended(pids - set(codes), signal.SIGKILL)
        time.sleep(0.01)
    return codes


def ended(pids: set[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    main()
