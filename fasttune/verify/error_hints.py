"""What a broken installation prints → what it means, and the command that fixes it: error_hints.toml, filled in."""

import re
import signal
import sys
import traceback
from dataclasses import dataclass

from fasttune import stack
from fasttune.errors import last_line
from fasttune.verify import PIP, Result, install_command, read_table


@dataclass(frozen=True)
class Hint:
    """`fatal`: a check that passed although this was printed has failed."""

    meaning: str
    fix: str
    fatal: bool


def explain(text: str, suspect: str = "") -> Hint | None:
    """The first hint that fits `text`, its fix a command; or None. `suspect` is the module under test."""
    table = read_table("error_hints.toml")
    for hint in table["hints"]:
        if match := re.search(hint["pattern"], text):
            python = f"{sys.version_info.major}.{sys.version_info.minor}"
            filled = {"suspect": suspect, "pip": PIP, "python": python}
            modules = [name.format(*match.groups(), **filled) for name in hint.get("reinstall", ())]
            names = [stack.canonical(module.split(".")[0]) for module in modules if module]
            packages = dict.fromkeys(table["packages"].get(name, name) for name in names)
            fix = hint.get("fix", "").format(*match.groups(), **filled) or install_command(*packages)
            return Hint(hint["meaning"].format(*match.groups()), fix, hint.get("fatal", False))
    return None


def from_exception(name: str, error: BaseException, suspect: str = "") -> Result:
    """A failed result for an exception: its meaning where we know it, its text where we do not."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    # The package whose code raised: the last one under site-packages in the traceback.
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(chain[-1].__traceback__)]
    raised = re.findall(r"/site-packages/(?!fasttune\b)(\w+)", "\n".join(files))
    known = explain("\n".join(map(str, chain)), raised[-1] if raised else suspect)
    if known is None:
        return Result(name, "fail", line[:400])
    return Result(name, "fail", f"{known.meaning} ({line[:200]})", known.fix)


def from_exit(name: str, returncode: int, output: str, suspect: str = "") -> Result:
    """A failed result for a process that ended without an answer; `output` is what it printed."""
    known = explain(output, suspect)
    if returncode < 0:
        ended = signal.Signals(-returncode).name
        what = read_table("error_hints.toml")["signals"].get(ended, f"was ended by signal {-returncode}")
        # A crash without words: reinstalling the package under test helps most often.
        fix = known.fix if known else install_command("torch", *([suspect] if suspect else []))
        return Result(name, "fail", f"its process {what}" + (f"; {known.meaning}" if known else ""), fix)
    if known is not None:
        return Result(name, "fail", known.meaning, known.fix)
    last = last_line(output, "it printed nothing")[:300]
    return Result(name, "fail", f"its process ended with exit code {returncode}: {last}")
