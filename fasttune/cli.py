"""The command line: imports one module when its command is asked for, so that --help answers at once.

fasttune train | plan | data | bench CONFIG [key=value …]     fasttune eval | generate | merge RUN     fasttune verify
Exit codes: 0 success, 1 a run or check failed, 2 wrong input.
"""

import argparse
import atexit
import errno
import gc
import os
import shlex
import signal
import sys
from typing import Any

from fasttune import errors, hub, system
from fasttune.errors import ConfigError, FasttuneError
from fasttune.options import check_limits, parser

NO_MORE_OUTPUT = (errno.ENOSPC, errno.EIO)
Done = tuple[int, Any]  # the exit code, and what --json prints


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # whoever started this has closed it, as with >&-
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  for as long as the process lives
    if argv is None:
        system.leave_current_folder()
        atexit.register(gc.freeze)  # else Python looks through all of torch once more before it ends: 2 seconds
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, in a pipe or a log; read by tqdm's import
    hub.quiet()
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["verify"]:  # verify has a parser of its own: it is also `python -m fasttune.verify`
        from fasttune.verify import main as verify

        return verify.main(arguments[1:])
    if arguments[:1] == ["completion"]:
        from fasttune.tools import completion

        return completion.main(arguments[1:], parser())
    options, rest = parser().parse_known_args(arguments)
    if any(text.startswith("-") for text in rest):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "eval":  # argparse takes no more runs behind an option
        options.others, rest = [*options.others, *(r for r in rest if "=" not in r)], [r for r in rest if "=" in r]
    if rest and "config" not in options:
        parser().error(f"{options.command} takes no settings: {' '.join(rest)}")
    options.overrides += rest  # argparse takes no key=value that stands behind an option
    try:
        check_limits(options)
        from fasttune import hardware

        several = options.command in ("train", "bench") and options.gpus  # each process that it starts takes one
        if options.command not in ("init", "schema") and hardware.has_nvidia_smi() and not several:
            from fasttune import gpus

            gpus.pin()
        code, document = _run(options, alone=argv is None)
    except KeyboardInterrupt as error:
        print(f"fasttune: interrupted{options.interrupted}", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    except FasttuneError as error:
        if options.debug:
            raise
        for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
            print(errors.one_line(f"fasttune: {problem}"), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        of_output = isinstance(error, BrokenPipeError) or error.errno in NO_MORE_OUTPUT
        if error.filename is not None or not of_output:  # of a file that is opened
            raise
        return _without_stdout(error)
    try:
        if options.json:
            from fasttune import report

            print(report.to_json_line(document))
        sys.stdout.flush()
    except OSError as error:
        return _without_stdout(error)
    return code


def _run(options: argparse.Namespace, alone: bool) -> Done:
    """alone: nothing else goes on in this process, which ends after it."""
    try:
        return COMMANDS[options.command](options)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM) if alone else ():  # a second one would break into the rest
            signal.signal(number, signal.SIG_IGN)
        raise
    finally:  # a bar must not stand below the message of an error
        if "fasttune.terminal" in sys.modules:
            sys.modules["fasttune.terminal"].close()


def _without_stdout(why: OSError) -> int:
    """The exit code where stdout takes no more: nobody reads it, as behind `| head`, or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes there when Python ends
    if isinstance(why, BrokenPipeError):
        return 128 + signal.SIGPIPE
    print(f"fasttune: the output cannot be written: {why.strerror}; send it elsewhere", file=sys.stderr)
    return 1


def init(options: argparse.Namespace) -> Done:
    """`fasttune init`: 0, with the ready configs on stdout, or one of them written."""
    from fasttune.tools import init

    return 0, init.run(options)


def schema(options: argparse.Namespace) -> Done:
    """`fasttune schema`: 0, with the schema on stdout; on one line with --json."""
    from fasttune.tools import schema

    return 0, schema.run(options)


def train(options: argparse.Namespace) -> Done:
    """`fasttune train`: 0 completed, 1 failed, 130 / 143 interrupted by SIGINT / SIGTERM (143 by max_hours too)."""
    from pathlib import Path

    from fasttune import config, terminal
    from fasttune.core import ranks as processes, run_folder, train as training
    from fasttune.errors import OutputError
    from fasttune.metrics import Stopped
    from fasttune.tools import card, estimate

    if options.resume and "=" in options.resume:  # argparse takes the setting behind a bare --resume for its value
        options.overrides, options.resume = [*options.overrides, options.resume], ""
    if options.resume and (options.config is None or "=" in options.config):  # RUN alone: it knows its config
        options.overrides = [*filter(None, [options.config]), *options.overrides]
        path = Path(options.resume, "config.yaml").expanduser()
        if path.exists() and not run_folder.is_run(path.parent):  # a pipe, for one, would be waited for
            raise OutputError(f"--resume {options.resume}: fasttune did not write its config.yaml; name a run's folder")
        options.config = str(path)
    if options.config is None:
        raise ConfigError(["train: name a config, e.g. configs/quickstart.yaml, or --resume RUN"])
    settings = config.load(options.config, options.overrides)
    launching = options.gpus or options.print_launch or options.nodes
    ranks, folder = processes.ALONE if launching else processes.of_environment(), None
    if options.resume is not None:
        from fasttune.core import resume

        folder = resume.to_resume(settings, options.resume)
    if launching:
        from fasttune import gpus
        from fasttune.tools import launch

        options.json = False  # that of rank 0 is printed
        if options.print_launch or options.nodes:
            print(launch.printed(options, settings), end="")
            return 0, None
        training.preflight(settings, folder)
        processes.preflight(settings)
        return launch.run(gpus.count(options.gpus), sys.argv[1:]), None
    reporter = terminal.Reporter() if not ranks.rank else terminal.Reporter(console=terminal.Console(quiet=True))
    options.json = options.json and not ranks.rank
    result = training.run(settings, reporter, folder, when_ready=estimate.add_to, when_saved=card.of_run, ranks=ranks)
    reporter.finish(result)
    if result.status == "interrupted":
        by_hand = result.error in (Stopped.SIGINT, Stopped.AT_ONCE)
        return 128 + (signal.SIGINT if by_hand else signal.SIGTERM), result
    return 0 if result.status == "completed" else 1, result


def bench(options: argparse.Namespace) -> Done:
    """`fasttune bench`: 0, or 1 when the arms cannot be compared (INVALID)."""
    from pathlib import Path

    from fasttune import terminal
    from fasttune.bench import files, page, run

    settings = _priced(options)
    if options.gpus and options.arms:
        raise FasttuneError("bench: --gpus compares runs of fasttune with each other; leave --arms out")
    names = run.checked_arms(settings, "fasttune" if options.gpus else options.arms, options.repeats, options.steps)
    folder = Path(options.output or f"runs/bench-{settings.name}")
    said = {"--repeats": options.repeats, "--steps": options.steps, "--arms": options.arms, "--gpus": options.gpus}
    said["--usd-per-hour"] = options.usd_per_hour
    flags = [text for flag, value in said.items() if value is not None for text in (flag, str(value))]
    command = shlex.join(["fasttune", "bench", options.config, *options.overrides, *flags])
    asked = (options.repeats, options.steps, folder, command, terminal.Reporter().progress, options.gpus)
    result = run.run(settings, names, *asked)
    terminal.close()
    files.write(result, folder)
    page.show(result, folder)
    return 0 if result.valid else 1, result.as_dict()


def evaluate(options: argparse.Namespace) -> Done:
    """`fasttune eval`: 0, with the scores on stderr; of several runs how they compare."""
    from fasttune.tools import evaluate as evaluation

    if options.others:
        from fasttune.tools import compare, compare_page

        compared, folder = compare.run(options)
        compare_page.write(compared, folder)
        compare_page.show(compared, folder)
        return 0, compared.as_dict()
    result = evaluation.run(options)
    evaluation.show(result)
    return 0, result


def data(options: argparse.Namespace) -> Done:
    """`fasttune data`: 0, with the page on stderr."""
    from fasttune import config, terminal
    from fasttune.tools import data_page, inspect_data

    figures = inspect_data.look(config.load(options.config, options.overrides), options.rows, terminal.Reporter())
    data_page.show(figures)
    return 0, figures


def tokenize(options: argparse.Namespace) -> Done:
    """`fasttune tokenize`: 0, with both files written."""
    from fasttune import config, terminal
    from fasttune.tools import tokenize_corpus

    written = tokenize_corpus.run(config.load(options.config, options.overrides), options.out, terminal.Reporter())
    tokenize_corpus.show(written)
    return 0, written


def generate(options: argparse.Namespace) -> Done:
    """`fasttune generate`: 0, with the answers on stdout or in a file; 141 when stdout is closed, as by `| head`."""
    from fasttune.tools import generate

    return 0, generate.run(options)


def merge(options: argparse.Namespace) -> Done:
    """`fasttune merge`: 0, or 1 when the written model does not answer as base + adapter does."""
    from fasttune.tools import merge

    done = merge.run(options)
    return 0 if done["verified"] else 1, done


def plan(options: argparse.Namespace) -> Done:
    """`fasttune plan`: 0, or 1 when it does not fit; the page goes to stderr."""
    from fasttune import terminal
    from fasttune.tools import plan

    gpus, nodes = options.gpus, options.nodes
    figures = plan.look(_priced(options), options.gpu, terminal.Reporter(), gpus * nodes, nodes)
    plan.show(figures)
    return 0 if figures.fits else 1, figures


def _priced(options: argparse.Namespace) -> Any:
    """The config, with the price of --usd-per-hour."""
    from fasttune import config

    price = [] if options.usd_per_hour is None else [f"usd_per_hour={options.usd_per_hour}"]
    return config.load(options.config, [*options.overrides, *price])


COMMANDS = {
    "init": init,
    "schema": schema,
    "train": train,
    "data": data,
    "tokenize": tokenize,
    "plan": plan,
    "bench": bench,
    "eval": evaluate,
    "generate": generate,
    "merge": merge,
}

if __name__ == "__main__":
    sys.exit(main())
