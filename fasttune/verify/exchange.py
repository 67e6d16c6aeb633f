"""`fasttune verify --gpus N`: whether the ranks of a run reach each other, what they exchange is right, and how fast.

Every pair sums and copies, over gloo (what ranks tell each other) and, with GPUs, over NCCL (their gradients).
As a program, with torchrun's environment, it is one of them: rank 0 prints what all have seen, a JSON line a pair.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import combinations
from typing import Any

from fasttune import child_process
from fasttune.verify import Result, judged
from fasttune.verify.error_hints import from_exit

VALUES = {"gloo": 2**22, "nccl": 2**26}  # float32: 16 and 256 MiB
REPEATS, TIMEOUT_S, LIMIT_S = 5, 60.0, 400
SLOWEST_SHARE = 0.5  # of the median pair's bandwidth: a pair below is worth a look


def check(processes: int) -> Iterator[Result]:
    """One result for each way, of all pairs."""
    ended = start(processes)
    found = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    if ended.returncode or not found:
        yield from_exit("exchange", ended.returncode or 1, ended.stdout + ended.stderr, "torch")
        return
    for way in dict.fromkeys(pair["way"] for pair in found):
        pairs = [pair for pair in found if pair["way"] == way]
        wrong = [between(pair) for pair in pairs if not pair["right"]]
        rates = [pair["gb_s"] for pair in pairs]
        middle = statistics.median(rates)
        slow = [f"{between(pair)} {pair['gb_s']:.1f}" for pair in pairs if pair["gb_s"] < SLOWEST_SHARE * middle]
        detail = (
            f"{len(pairs)} pairs of {processes} ranks sum and copy rightly, {min(rates):.1f} to {max(rates):.1f} GB/s"
        )
        if wrong:
            fix = "NCCL_DEBUG=INFO fasttune verify --gpus all"
            yield judged(f"exchange:{way}", False, f"wrong sums or copies between ranks {', '.join(wrong)}", fix)
        elif slow:
            yield Result(f"exchange:{way}", "warn", f"{detail}; slow: {', '.join(slow)}", "nvidia-smi topo -m")
        else:
            yield Result(f"exchange:{way}", "pass", detail)


def between(pair: dict[str, Any]) -> str:
    first, second = pair["ranks"]
    return f"{first} and {second}"


def start(processes: int) -> subprocess.CompletedProcess[str]:
    """All processes, each with a GPU of its own if there are; the answer of rank 0, or of the first that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place: dict[str, Any] = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = []
    for rank in range(processes):
        own = {name: str(value) for name, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        command = child_process.command("fasttune.verify.exchange")
        running.append(subprocess.Popen(command, env=child_process.environment() | own, **pipes))
    deadline_s = time.monotonic() + LIMIT_S
    ended = []
    for process in running:
        try:
            out, err = process.communicate(timeout=max(1.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return next((each for each in ended if each.returncode), ended[0])


# -- one of the processes


def main() -> int:
    from fasttune import gpus

    gpus.pin()
    import torch
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=TIMEOUT_S)))
    ways = {"gloo": "cpu"} | ({"nccl": "cuda"} if torch.cuda.is_available() else {})
    for way, device in ways.items():
        for pair in combinations(range(size), 2):
            key = f"{way}/{pair[0]}/{pair[1]}"
            if rank in pair:
                right, seconds = exchange(dist.PrefixStore(key, store), pair.index(rank), way, device)
                store.set(f"{key}/{rank}", json.dumps([right, seconds]))
            seen = [json.loads(store.get(f"{key}/{each}")) for each in pair]  # all wait: a pair at a time is measured
            if rank == 0:
                gb_s = 4 * VALUES[way] / max(seconds for _, seconds in seen) / 1e9
                print(json.dumps({"way": way, "ranks": pair, "right": all(right for right, _ in seen), "gb_s": gb_s}))
    store.set(f"done/{rank}", "")
    if rank == 0:  # it holds the store: one that waited too could find it gone
        store.wait([f"done/{each}" for each in range(size)])
    return 0


def exchange(store: Any, place: int, way: str, device: str) -> tuple[bool, float]:
    """(whether sum and copy are right, seconds of the sum) between the two of a pair."""
    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=TIMEOUT_S)
    if way == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group: Any = dist.ProcessGroupNCCL(store, place, 2, options)
    else:
        group = dist.ProcessGroupGloo(store, place, 2, timeout)
    values = torch.arange(VALUES[way], dtype=torch.float32, device=device) % 1024
    took = []
    for _ in range(REPEATS):
        summed = values * (place + 1)
        began = time.perf_counter()
        group.allreduce([summed]).wait()
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    copied = values if place == 0 else torch.zeros_like(values)
    group.broadcast([copied], dist.BroadcastOptions()).wait()
    right = bool(torch.equal(summed, 3 * values)) and bool(torch.equal(copied, values))
    return right, min(took)


if __name__ == "__main__":
    sys.exit(main())
