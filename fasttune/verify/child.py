"""`python -m fasttune.verify.child MODULE REPORT NAME…`: run named checks of MODULE (its CHECKS) in this process.

Every result goes to REPORT (JSON lines) the moment it is known, so that a crash loses only the check that crashed.
stdout and stderr are one regular file, made by verify.py: what a check printed is read back from it.
"""

import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path

from fasttune.verify import Result
from fasttune.verify.error_hints import explain, from_exception


def main(argv: list[str]) -> int:
    module, report, *names = argv
    for name in names:
        suspect = name.removeprefix("import:") if name.startswith("import:") else ""
        start, printed_before = time.perf_counter(), _printed_bytes()
        try:
            for result in importlib.import_module(module).CHECKS[name]():
                result = _with_printed(result, printed_before, suspect)
                result.seconds = round(time.perf_counter() - start, 2)
                _report(report, result)
                start = time.perf_counter()
        except Exception as error:
            result = from_exception(name, error, suspect)
            result.seconds = round(time.perf_counter() - start, 2)
            _report(report, result)
        _report(report, None, name)
    return 0


def _with_printed(result: Result, printed_before: int, suspect: str) -> Result:
    """A check that passed while a loader complained did not pass: some libraries go on without their kernels."""
    sys.stdout.flush()
    sys.stderr.flush()
    if result.status != "pass" or (size := _printed_bytes()) <= printed_before:
        return result
    printed = os.pread(1, size - printed_before, printed_before).decode(errors="replace")
    known = explain(printed, suspect)
    if known is None or known.printed is None:
        return result
    return Result(result.name, known.printed, f"{result.detail}; but {known.meaning}", known.fix)


def _printed_bytes() -> int:
    return os.fstat(1).st_size


def _report(path: str, result: Result | None, done: str = "") -> None:
    line = {"done": done} if result is None else dataclasses.asdict(result)
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # libraries with threads of their own may hang or crash at interpreter exit; the results are out
