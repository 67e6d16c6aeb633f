"""Python processes of our own: they find the modules that this process finds, and none in the current folder.

A stranger's folder may hold a torch.py, and `python -m` and `python -c` put the current folder first on the path.
"""

import os
import sys

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of this very package
DROPPED = ("PYTHONPATH", "PYTHONSTARTUP")


def leave_current_folder() -> None:
    """Every command, before it imports anything of others: also for processes that libraries start (spawn)."""
    sys.path[:] = path()
    os.environ["PYTHONSAFEPATH"] = "1"


def path() -> list[str]:
    """sys.path without the current folder, with the one that holds this package."""
    here = os.stat(".")
    kept = [place for place in sys.path if place == HOME or (place and not _is(place, here))]
    return kept if HOME in kept else [*kept, HOME]


def command(module: str, *arguments: str) -> list[str]:
    """What starts a module of ours as `python -m` does; with `environment()`."""
    return [sys.executable, "-P", os.path.abspath(__file__), os.pathsep.join(path()), module, *arguments]


def environment() -> dict[str, str]:
    """This process's, without what adds modules of somebody else's choice."""
    return {name: value for name, value in os.environ.items() if name not in DROPPED}


def _is(place: str, folder: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(place), folder)
    except OSError:
        return False  # a zip of modules that is not there


if __name__ == "__main__":  # the other side of `command`
    import runpy

    sys.path[:] = [HOME]
    import fasttune  # noqa: F401  this very one, whatever else the path holds

    sys.path[:] = sys.argv[1].split(os.pathsep)
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
