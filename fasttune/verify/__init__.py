"""What `fasttune verify` runs: one file a subject. Heavy imports happen in child processes only.

    facts.py       machine, pins and version rules (in verify's own process, no torch)
    imports.py     every package of the stack alone
    kernels.py     matmul, Llama 3.1 rotary frequencies
    attention.py   every attention backend against float64
    parity.py      Unsloth against plain transformers + PEFT (plain.py is the other side)
    training.py    two real steps of `fasttune train`, and what it wrote and connected to (probe.py watches inside)
    online.py      hub and token, only with --online
    table.py       the results on the terminal
    guard.py       blocks and records connections
    symptoms.py    what an error text means and the command that mends it
    runner.py      the child processes: two at a time, with time limits
    child.py       runs named checks of one file in a process of its own

A check is a function that yields results: `CHECKS = {"name": function}` in each file.
"""

from dataclasses import dataclass
from typing import Literal

from fasttune import stack

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass
class Result:
    """What one check saw. `fix` is a command or an instruction, empty where there is nothing to mend."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    seconds: float = 0.0


def install_command(*packages: str) -> str:
    """Shell command that brings `packages` to what the active stack pins, or puts them there anew."""
    return stack.repair_command(packages, stack.active_stack())
