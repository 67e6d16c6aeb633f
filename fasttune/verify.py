"""`python -m fasttune.verify [--json] [--quick] [--online]`: does this environment really work; if not, what mends it.

Facts, pins and version rules are read here; everything that runs a binary runs in child processes, two at a time, each
with a time limit, because one broken library can take its process down. Exit 0, or 1 if a check failed.
"""

import argparse
import dataclasses
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fasttune import hardware as machines, stack
from fasttune.checks import Result, Status, facts
from fasttune.checks.runner import Job, run_jobs
from fasttune.errors import FasttuneError

STYLES: dict[Status, str] = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


LIGHT_MODULES = ("torchao", "accelerate", "torch", "datasets", "triton", "numpy", "tokenizers")
CUDA_MODULES = ("torchvision", "xformers", "bitsandbytes", "flash_attn")
# The long ones first, so that two cores are busy until the end.
JOBS = (
    Job("fasttune.checks.training", ("train-two-steps",), 420, "unset"),
    Job("fasttune.checks.parity", ("import:unsloth", "unsloth-parity", "privacy-statistics"), 420, "unset"),
    Job("fasttune.checks.imports", ("import:transformers",)),
    Job("fasttune.checks.imports", ("import:peft",)),
    Job("fasttune.checks.imports", ("import:trl",)),
    Job(
        "fasttune.checks.attention",
        (
            "attention:sdpa-math",
            "attention:sdpa-flash",
            "attention:sdpa-efficient",
            "attention:sdpa-cudnn",
            "attention:torch-varlen",
            "attention:xformers",
            "attention:flash-attn",
            "attention:flash-attn-3",
        ),
    ),
    Job("fasttune.checks.kernels", ("matmul-bf16", "rope-llama31")),
    *(Job("fasttune.checks.imports", (f"import:{module}",)) for module in (*LIGHT_MODULES, *CUDA_MODULES)),
)
TINY_RUN = "train configs/quickstart.yaml --debug model.name=builtin:tiny train.max_steps=2 output_dir=runs/verify"
REPRODUCE = {"train-two-steps": f"{sys.executable} -m fasttune.cli {TINY_RUN}"}
ONLINE = (Job("fasttune.checks.online", ("online:hub", "online:token"), 60, "open"),)


def main(argv: list[str] | None = None) -> int:
    """Run the checks, print the table or the JSON document, return the exit code."""
    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupted)  # so that children and their folders go with us
    try:
        hardware, stack_name = machines.detect(), stack.active_stack()
        results = list(facts.check(hardware, stack_name))
        if not options.quick:
            results += run_jobs(JOBS + (ONLINE if options.online else ()), progress())
    except FasttuneError as error:
        print(f"fasttune verify: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fasttune verify: interrupted, nothing is left running", file=sys.stderr)
        return 130
    point_at_pins(results)
    ok = not any(result.status == "fail" for result in results)
    if options.json:
        checks = [dataclasses.asdict(result) for result in results]
        print(json.dumps({"ok": ok, "stack": stack_name, "hardware": dataclasses.asdict(hardware), "checks": checks}))
    else:
        show(results, stack_name, Console())
    return 0 if ok else 1


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fasttune verify", description="Check this environment by running it.")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line of stdout")
    parser.add_argument("--quick", action="store_true", help="facts, pins and version rules only: under 3 seconds")
    parser.add_argument("--online", action="store_true", help="also the hub, the token and the gated model")
    return parser


def point_at_pins(results: list[Result]) -> None:
    """A failure without a known cause: mend the pins first; if they are right, show the error in full."""
    pins = next(result for result in results if result.name == "pins")
    for result in results:
        if result.status == "fail" and not result.fix:
            result.fix = pins.fix or REPRODUCE.get(result.name, "bash scripts/setup_h100.sh --recreate")


def show(results: list[Result], stack_name: str, console: Console) -> None:
    """The table, failures last; below it every fix in full, unwrapped, to be copied."""
    order: tuple[Status, ...] = ("skip", "pass", "warn", "fail")
    rules = [result for result in results if result.name.startswith("rule:") and result.status == "pass"]
    rows = [result for result in results if result not in rules]
    if rules:
        rows.append(Result("rules", "pass", f"{len(rules)} version rules hold"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True, justify="right")
    for result in sorted(rows, key=lambda row: order.index(row.status)):
        took = f"{result.seconds:.1f} s" if result.seconds >= 0.05 else ""
        table.add_row(
            Text(result.status, STYLES[result.status]), Text(result.name), Text(result.detail), Text(took, "dim")
        )
    console.print(table)
    for result in sorted(results, key=lambda row: order.index(row.status)):
        if result.fix and result.status in ("warn", "fail"):
            console.print(
                Text.assemble("\n", (f"{result.status} {result.name}: ", STYLES[result.status]), "mend it with")
            )
            console.print(Text(f"  {result.fix}"), soft_wrap=True)
    count = Counter(result.status for result in results)
    summary = ", ".join(f"{count[status]} {status}" for status in reversed(order) if count[status])
    ok = not count["fail"]
    verdict = ("This environment works" if ok else "This environment is broken", "bold green" if ok else "bold red")
    console.print(Text.assemble("\n", verdict, f" (stack {stack_name}): {summary}"))


def progress() -> Callable[[str], None]:
    """Says on stderr, on one line that is overwritten, what is running; silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _interrupted(number: int, frame: FrameType | None) -> Any:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
