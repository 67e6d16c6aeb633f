"""What `fasttune verify` runs, one file a subject. Heavy imports happen in child processes only (runner.py).

Facts (facts.py) and version rules (version_rules.toml) are read without importing what they are about. Every other
check is a function that yields results in a child process: named in `CHECKS` of its file, and run by a job of main.py.
"""

import shlex
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fasttune import stack

Status = Literal["pass", "warn", "fail", "skip"]
PIP = shlex.join([sys.executable, "-m", "pip"])


@dataclass
class Result:
    """What one check saw. `fix` is a command or an instruction, empty where there is nothing to fix."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    seconds: float = 0.0


def judged(name: str, ok: bool, detail: str, fix: str = "", reinstall: tuple[str, ...] = ()) -> Result:
    """Passed, or failed with its fix: a command, or packages to bring to their pins."""
    if ok:
        return Result(name, "pass", detail)
    return Result(name, "fail", detail, fix or (install_command(*reinstall) if reinstall else ""))


def install_command(*packages: str) -> str:
    """The command that brings `packages` to what the active stack pins, or reinstalls them where they are so."""
    return stack.repair_command(packages, stack.active_stack())


@cache
def read_table(name: str) -> dict[str, Any]:
    """A TOML file of this folder: Python reads it by itself, and PyYAML may be what is broken."""
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
