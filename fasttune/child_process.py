"""A module of ours in a process of its own, which finds no module in the current folder."""

import os
import sys

from fasttune.system import HOME, child_path

DROPPED = ("PYTHONPATH", "PYTHONSTARTUP")
# What a child process runs: this very package first, then the path of its parent, then a module as `python -m` does.
START = """import runpy, sys
sys.path[:] = [sys.argv[1]]
import fasttune
sys.path[:] = sys.argv[2].split(":")
del sys.argv[:3]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def command(module: str, *arguments: str) -> list[str]:
    """What starts a module of ours as `python -m` does; with `environment()`."""
    return [sys.executable, "-P", "-c", START, HOME, ":".join(child_path()), module, *arguments]


def environment() -> dict[str, str]:
    """This process's, without what adds modules of somebody else's choice."""
    return {name: value for name, value in os.environ.items() if name not in DROPPED}
