"""`python -m fasttune.verify [--json] [--quick] [--online]`: does this environment really work; if not, what fixes it.

Facts, pins and version rules are read here; everything that runs a binary runs in child processes, two at a time, each
with a time limit, because one broken library can take its process down. Exit 0, or 1 if a check failed.
"""

import dataclasses
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from fasttune import errors, gpus, hardware as machines, hub, stack, system
from fasttune.errors import FasttuneError
from fasttune.verify import PIP, Result, Status, exchange, facts
from fasttune.verify.runner import CheckJob, run_jobs

if TYPE_CHECKING:
    from rich.console import Console

BACKENDS = ("sdpa-math", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "torch-varlen", "flash-attn", "flash-attn-3")
ARITHMETIC = (*(f"attention:{name}" for name in BACKENDS), "matmul-bf16", "rope-llama31")
# The long ones first, so that two cores are busy until the end.
JOBS = (
    CheckJob("fasttune.verify.smoke_train", ("train-two-steps",), 420, "unset"),
    CheckJob("fasttune.verify.parity", ("import:unsloth", "unsloth-parity", "privacy-statistics"), 420, "unset"),
    CheckJob("fasttune.verify.attention", ARITHMETIC, 240),
    CheckJob("fasttune.verify.facts", tuple(f"import:{name}" for name in facts.MODULES), 300),
)
ONLINE = (CheckJob("fasttune.verify.facts", ("online:token",), 60, "open"),)
TINY_RUN = "train configs/quickstart.yaml --debug model.name=builtin:tiny train.max_steps=2 output_dir=runs/verify"
SHOW_IN_FULL = {"train-two-steps": f"{sys.executable} -m fasttune.cli {TINY_RUN}"}
STYLES: dict[Status, str] = {"skip": "dim", "pass": "green", "warn": "yellow", "fail": "bold red"}  # as they are shown


def parser() -> errors.Parser:
    made = errors.Parser(prog="fasttune verify", description="Check this environment by running it.")
    made.add_argument("--json", action="store_true", help="one JSON document as the last line of stdout")
    made.add_argument("--quick", action="store_true", help="facts, pins and version rules only: under 3 seconds")
    several = "also whether N processes, or one for each GPU (all), reach each other, pair by pair"
    made.add_argument("--gpus", metavar="N", help=several)
    made.add_argument("--online", action="store_true", help="also the hub, the token and the gated model")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the checks, print the table or the JSON document, return the exit code."""
    if argv is None:
        system.leave_current_folder()
    hub.quiet()
    options = parser().parse_args(argv)
    stop: list[int] = []  # signals are noted, and obeyed by the threads that own the children
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stop.append(received))
    try:
        exchanged = list(exchange.check(gpus.count(options.gpus))) if options.gpus else []  # before one is chosen
        gpus.pin()
        hardware, stack_name = machines.detect(), stack.active_stack()
        results = [*facts.read(hardware, stack_name), *exchanged]
        if not options.quick:
            results += run_jobs(JOBS + (ONLINE if options.online else ()), progress(), stop)
    except FasttuneError as error:
        print(errors.one_line(f"fasttune verify: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fasttune verify: interrupted, nothing is left running", file=sys.stderr)
        return 130
    complete_fixes(results)
    ok = not any(result.status == "fail" for result in results)
    if options.json:
        checks = [dataclasses.asdict(result) for result in results]
        print(json.dumps({"ok": ok, "stack": stack_name, "hardware": dataclasses.asdict(hardware), "checks": checks}))
    else:
        show(results, stack_name)
    return 0 if ok else 1


def complete_fixes(results: list[Result]) -> None:
    """A failure without a known cause: fix the pins first; where they are right, show the error in full.

    pip cannot fix packages from elsewhere or half-removed ones, and would break others' work in a system's Python: what
    helps against those comes first.
    """
    named = {result.name: result for result in results}
    before_pip = named["site-packages"].fix or (sys.prefix == sys.base_prefix and named["python"].fix)
    for result in results:
        if result.status == "fail" and not result.fix:
            result.fix = named["pins"].fix or SHOW_IN_FULL.get(result.name, "bash scripts/setup_h100.sh --recreate")
        if before_pip and result.fix.startswith(PIP):
            result.fix = before_pip


def progress() -> Callable[[str], None]:
    """Says on stderr, on one line that is overwritten, what is running; silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def show(results: list[Result], stack_name: str) -> None:
    """The table; plain lines where rich itself is what is missing."""
    try:
        from rich.console import Console
    except ImportError:
        for result in results:
            print(f"{result.status}  {result.name}  {result.detail}" + (f"\n      {result.fix}" if result.fix else ""))
    else:
        show_table(results, stack_name, Console())


def show_table(results: list[Result], stack_name: str, console: "Console") -> None:
    """A table that fits the terminal, failures last; below it every fix in full, unwrapped, to be copied."""
    from rich.table import Table
    from rich.text import Text

    order = list(STYLES)
    rules = [result for result in results if result.name.startswith("rule:") and result.status == "pass"]
    rows = [result for result in results if result not in rules]
    rows += [Result("rules", "pass", f"{len(rules)} version rules hold")] if rules else []
    rows.sort(key=lambda row: order.index(row.status))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True, justify="right")
    for row in rows:
        took = f"{row.seconds:.1f} s" if row.seconds >= 0.05 else ""
        table.add_row(Text(row.status, STYLES[row.status]), Text(row.name), Text(row.detail), Text(took, "dim"))
    console.print(table)
    for row in rows:
        if row.fix and row.status in ("warn", "fail"):
            console.print(Text.assemble("\n", (f"{row.status} {row.name}: ", STYLES[row.status]), "fix it by"))
            console.print(Text(f"  {row.fix}"), soft_wrap=True)
    count = Counter(result.status for result in results)
    summary = ", ".join(f"{count[status]} {status}" for status in reversed(order) if count[status])
    ok = not count["fail"]
    verdict = ("This environment works" if ok else "This environment is broken", "bold green" if ok else "bold red")
    console.print(Text.assemble("\n", verdict, f" (stack {stack_name}): {summary}"))
