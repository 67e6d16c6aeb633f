"""`python -m fasttune.verify [--json] [--quick] [--online]`: does this environment really work; if not, what mends it.

Facts, pins and version rules are read here; everything that runs a binary runs in child processes, two at a time, each
with a time limit, because one broken library can take its process down. Exit 0, or 1 if a check failed.
"""

import dataclasses
import json
import signal
import sys
from collections.abc import Callable

from fasttune import errors, gpus, hardware as machines, stack, system
from fasttune.errors import FasttuneError
from fasttune.verify import Result, facts, imports
from fasttune.verify.runner import Job, run_jobs

# The long ones first, so that two cores are busy until the end.
JOBS = (
    Job("fasttune.verify.smoke_train", ("train-two-steps",), 420, "unset"),
    Job("fasttune.verify.parity", ("import:unsloth", "unsloth-parity", "privacy-statistics"), 420, "unset"),
    Job(
        "fasttune.verify.attention",
        (
            "attention:sdpa-math",
            "attention:sdpa-flash",
            "attention:sdpa-efficient",
            "attention:sdpa-cudnn",
            "attention:torch-varlen",
            "attention:flash-attn",
            "attention:flash-attn-3",
        ),
    ),
    Job("fasttune.verify.kernels", ("matmul-bf16", "rope-llama31")),
    *(Job("fasttune.verify.imports", (name,)) for name in imports.CHECKS),
)
TINY_RUN = "train configs/quickstart.yaml --debug model.name=builtin:tiny train.max_steps=2 output_dir=runs/verify"
REPRODUCE = {"train-two-steps": f"{sys.executable} -m fasttune.cli {TINY_RUN}"}
ONLINE = (Job("fasttune.verify.online", ("online:hub", "online:token"), 60, "open"),)


def main(argv: list[str] | None = None) -> int:
    """Run the checks, print the table or the JSON document, return the exit code."""
    if argv is None:
        system.leave_current_folder()
    options = parser().parse_args(argv)
    stop: list[int] = []  # signals are noted, and obeyed between two steps, so that no child is left without an owner
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stop.append(received))
    try:
        gpus.pin()
        hardware, stack_name = machines.detect(), stack.active_stack()
        results = list(facts.check(hardware, stack_name))
        if not options.quick:
            results += run_jobs(JOBS + (ONLINE if options.online else ()), progress(), stop)
    except FasttuneError as error:
        print(errors.one_line(f"fasttune verify: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fasttune verify: interrupted, nothing is left running", file=sys.stderr)
        return 130
    point_at_pins(results)
    mend_first(results)
    ok = not any(result.status == "fail" for result in results)
    if options.json:
        checks = [dataclasses.asdict(result) for result in results]
        print(json.dumps({"ok": ok, "stack": stack_name, "hardware": dataclasses.asdict(hardware), "checks": checks}))
    else:
        show(results, stack_name)
    return 0 if ok else 1


def parser() -> errors.Parser:
    parser = errors.Parser(prog="fasttune verify", description="Check this environment by running it.")
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


def mend_first(results: list[Result]) -> None:
    """pip cannot mend packages from elsewhere or half-removed ones, and in a system's Python it breaks others' work."""
    named = {result.name: result for result in results}
    first = named["site-packages"].fix or (sys.prefix == sys.base_prefix and named["python"].fix)
    for result in results:
        if first and result.fix.startswith(f"{sys.executable} -m pip"):
            result.fix = first


def show(results: list[Result], stack_name: str) -> None:
    """The table; plain lines where rich itself is what is missing."""
    try:
        from fasttune.verify import table
    except ImportError:
        for result in results:
            print(f"{result.status}  {result.name}  {result.detail}" + (f"\n      {result.fix}" if result.fix else ""))
    else:
        table.show(results, stack_name, table.Console())


def progress() -> Callable[[str], None]:
    """Says on stderr, on one line that is overwritten, what is running; silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
