"""Several processes by one command: what starts them here, and the files that start them elsewhere."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_run import TREE

from fasttune import cli, config, gpus
from fasttune.core import checkpoint, ranks
from fasttune.errors import FasttuneError
from fasttune.tools import launch

CONFIG = "configs/quickstart.yaml"


def printed(kind: str, *more: str) -> str:
    options = cli.parser().parse_args(["train", CONFIG, "--print-launch", kind, "--gpus", "8", "--nodes", "2", *more])
    return launch.printed(options, config.load(CONFIG, options.overrides))


@pytest.mark.parametrize("kind", ["slurm", "torchrun"])
def test_a_shell_reads_what_is_printed(kind: str) -> None:
    text = printed(kind)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert f"--no-python fasttune train {CONFIG} output_dir=runs/quickstart" in text and "--nproc-per-node 8" in text
    assert not re.search("@[A-Z]+@", text), "a word was not filled in"


@pytest.mark.parametrize("kind", ["skypilot", "kubeflow"])
def test_a_scheduler_reads_what_is_printed(kind: str) -> None:
    text = printed(kind)
    tree = yaml.safe_load(text)
    nodes, script = {
        "skypilot": lambda: (tree["num_nodes"], tree["run"]),
        "kubeflow": lambda: (tree["spec"]["trainer"]["numNodes"], tree["spec"]["trainer"]["args"][0]),
    }[kind]()
    assert nodes == 2 and f"fasttune train {CONFIG} output_dir=" in script and "# export NCCL_SOCKET_IFNAME" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("asked", "said"),
    [("0", "a whole number from 1"), ("two", "a whole number from 1"), ("all", "no GPU here")],
)
def test_how_many_is_said_in_words(monkeypatch: pytest.MonkeyPatch, asked: str, said: str) -> None:
    monkeypatch.setattr(gpus, "read", lambda: ([], None))
    with pytest.raises(FasttuneError, match=said):
        gpus.count(asked)


def test_what_would_be_ignored_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(FasttuneError, match="LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR, MASTER_PORT not"):
        ranks.of_environment()
    monkeypatch.setenv("UNSLOTH_FSDP2", "1")
    monkeypatch.delenv("RANK")
    with pytest.raises(FasttuneError, match="UNSLOTH_FSDP2 divides a model among processes, here is one"):
        ranks.of_environment()


def test_bad_input_is_said_once_and_before_any_process_is_started(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fasttune.cli", "train", CONFIG, "--gpus", "2"]
    done = subprocess.run([*command, "data.train=nowhere.jsonl"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nowhere.jsonl" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("to_the_end", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_signal_to_the_command_ends_all_with_one_checkpoint(tmp_path: Path, to_the_end: bool) -> None:
    """Two processes on the CPU, as on two GPUs; by night then the same command to its end, with --json."""
    folder = tmp_path / "run"
    tree = TREE | {"train": TREE["train"] | {"max_steps": 300}, "checkpoint": {"every": "never"}}
    (tmp_path / "config.yaml").write_text(json.dumps(tree | {"output_dir": str(folder)}))
    command = [sys.executable, "-m", "fasttune.cli", "train", str(tmp_path / "config.yaml"), "--gpus", "2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while running.poll() is None and not ((folder / "metrics.jsonl").exists() and lines(folder) >= 3):
            time.sleep(0.01)
        os.kill(running.pid, signal.SIGTERM)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 143, said
    ((step, _),) = checkpoint.steps(folder)
    assert 3 <= step == lines(folder) < 300 and said.count("interrupted") == 1
    assert f"fasttune train {folder}/config.yaml --resume {folder} --gpus 2\n" in said

    if not to_the_end:
        return
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    (document,) = map(json.loads, again.stdout.splitlines())
    assert again.returncode == 0 and document["status"] == "completed" and document["ranks"]["ranks"] == 2


def lines(folder: Path) -> int:
    return len((folder / "metrics.jsonl").read_text().splitlines())
