"""`fasttune train --gpus N`: the same command in N processes of this machine, by torchrun's own launcher; and the files
that start it on several machines (--print-launch).
"""

import argparse
import logging
import os
import re
import shlex
import signal
import textwrap
import uuid
from pathlib import Path

from fasttune import child_process, hardware
from fasttune.config import Config
from fasttune.errors import FasttuneError, RunFailed

FILES = Path(__file__).parent / "launch_files"
GRACE_S = 600  # that the processes have after a signal: to end their step and to save
WATCH_S = 0.2


def printed(options: argparse.Namespace, config: Config) -> str:
    """The file or command that starts `fasttune train` on --nodes machines of --gpus each. Raises FasttuneError."""
    kind, nodes = options.print_launch, options.nodes or 1
    if kind is None:
        raise FasttuneError("--nodes: torchrun starts a run on several machines; --print-launch torchrun shows how")
    if not (options.gpus or "").isdecimal() or not int(options.gpus):
        raise FasttuneError("--print-launch: say with --gpus N how many GPUs each machine has")
    arguments = [options.config, *options.overrides]
    if config.output_dir is None:  # by which a job that is started again finds its run
        arguments.append(f"output_dir={'/runs' if kind == 'skypilot' else 'runs'}/{config.name}")
    (path,) = FILES.glob(f"{kind}.*")
    text, network = (found.read_text(encoding="utf-8") for found in (path, FILES / "network.sh"))
    if found := re.search(r"^( *)@NETWORK@\n", text, re.MULTILINE):
        text = text.replace(found[0], textwrap.indent(network, found[1]))
    values = {"NODES": str(nodes), "GPUS": options.gpus, "NAME": config.name, "TRAIN": shlex.join(arguments)}
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def run(processes: int, arguments: list[str]) -> int:
    """Run `fasttune` with `arguments`, but --gpus, in so many processes; returns its exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what happened is said below
    if not hardware.has_nvidia_smi():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=WATCH_S,
        shutdown_timeout=GRACE_S,
    )
    command = child_process.command("fasttune.cli", *_without_gpus(arguments))
    try:
        elastic_launch(config, command[0])(*command[1:])
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        raise RunFailed(f"rank {rank} was ended by {name}: --resume continues the run") from None
    return 0


def _without_gpus(arguments: list[str]) -> list[str]:
    at = next(i for i, text in enumerate(arguments) if text == "--gpus" or text.startswith("--gpus="))
    return [*arguments[:at], *arguments[at + (1 if "=" in arguments[at] else 2) :]]
