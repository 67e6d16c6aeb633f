"""The table of docs/compatibility.md, "what you arrive with", from the cases:  python tests/faults/fault_table.py"""

import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/compatibility.md"
START, END = "<!-- cases: made by tests/faults/fault_table.py -->", "<!-- /cases -->"
sys.path[:0] = [str(PAGE.parents[1]), str(Path(__file__).parent)]

from fault_cases import CASES, PYTHON_DEV, Case  # noqa: E402


def remedy(case: Case) -> str:
    """What helps, in words; a command where there is one."""
    parts = []
    if case.pinned:
        build = " of the CUDA 12 build" if case.pins_of == "cu12" else ""
        parts.append(f"the pinned {', '.join(case.pinned)}{build}")
    if case.uninstalled:
        parts.append(f"uninstall {', '.join(case.uninstalled)}")
    text = case.remedy.removeprefix("-m ").replace(PYTHON_DEV, "python3.12-dev")
    command = re.match(r"(bash|pip|apt-get|export|unset) ", text)
    return " and ".join(parts) or (f"`{text}`" if command else text) or "nothing to do"


def said_by(case: Case) -> str:
    where = {"setup": "the set-up", "stderr": "any command"}.get(case.check, f"`{case.check}`")
    return f"{where}: {case.status}"


def render(page: str) -> str:
    """The page with the table of the cases between the marks."""
    rows = [f"| {case.arrives} | {case.wrong} | {said_by(case)} | {remedy(case)} |" for case in CASES]
    head = ["| you arrive with | what goes wrong | said by | what helps |", "| --- | --- | --- | --- |"]
    before, _, rest = page.partition(START)
    return before + "\n".join([START, *head, *rows, ""]) + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
