"""The command line: imports one module when its command is asked for, so that --help answers at once.

fasttune train CONFIG [key=value …]     fasttune data CONFIG [key=value …]     fasttune verify
Exit codes: 0 fine, 1 a run or check failed, 2 wrong input.
"""

import argparse
import signal
import sys

from fasttune import __version__
from fasttune.errors import ConfigError, FasttuneError

EXAMPLES = """examples:
  fasttune train configs/quickstart.yaml
  fasttune train configs/smollm2_135m_gsm8k.yaml data.train=rows.jsonl train.max_steps=20
  fasttune data configs/quickstart.yaml --rows 5
  fasttune verify --quick
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["verify"]:  # verify has a parser of its own: it is also `python -m fasttune.verify`
        from fasttune import verify

        return verify.main(arguments[1:])
    options, rest = parser().parse_known_args(arguments)
    if any(text.startswith("-") for text in rest):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides += rest  # argparse takes no key=value that stands behind an option
    try:
        return data(options) if options.command == "data" else train(options)
    except KeyboardInterrupt:
        done = "" if options.command == "data" else " before the first step; nothing was trained"
        print(f"fasttune: interrupted{done}", file=sys.stderr)
        return 128 + signal.SIGINT
    except FasttuneError as error:
        if options.debug:
            raise
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        for problem in problems:
            print(f"fasttune: {problem}", file=sys.stderr)
        return error.exit_code


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fasttune",
        description="Fine-tune an open model on one GPU as fast as the chip allows, and prove the number.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fasttune {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("verify", help="check this environment, with the command that fixes what is wrong")
    command = _with_config(commands.add_parser("train", help="fine-tune a model as a config says"))
    command.add_argument("--json", action="store_true", help="print run.json as the last line of stdout")
    command = _with_config(commands.add_parser("data", help="show the rows as they will be trained; trains nothing"))
    command.add_argument("--rows", type=int, default=3, metavar="N", help="rows to print (default 3)")
    command.add_argument("--json", action="store_true", help="print all figures as the last line of stdout")
    return top


def _with_config(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("config", help="YAML file, e.g. configs/quickstart.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that overrule the file")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def train(options: argparse.Namespace) -> int:
    """`fasttune train`: 0 completed, 1 failed, 130 / 143 interrupted by SIGINT / SIGTERM."""
    from fasttune import config, terminal, train as training

    settings = config.load(options.config, options.overrides)
    reporter = terminal.Reporter(None)
    result = training.run(settings, reporter)
    reporter.finish(result)
    if options.json:
        from fasttune import report

        print(report.to_json_line(result.as_dict()))
    if result.status == "interrupted":
        return 128 + (signal.SIGTERM if "SIGTERM" in (result.error or "") else signal.SIGINT)
    return 0 if result.status == "completed" else 1


def data(options: argparse.Namespace) -> int:
    """`fasttune data`: 0, with the page on stderr."""
    from fasttune import config, terminal, view, view_page

    if options.rows < 0:
        raise ConfigError([f"--rows {options.rows}: how many rows to print, 0 or more"])
    figures = view.look(config.load(options.config, options.overrides), options.rows, terminal.Reporter(None))
    view_page.show(figures)
    if options.json:
        from fasttune import report

        print(report.to_json_line(figures.as_dict()))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
