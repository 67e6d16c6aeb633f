"""The command line: imports one module when its command is asked for, so that --help answers at once.

fasttune train | plan | data | bench CONFIG [key=value …]     fasttune eval | generate | merge RUN     fasttune verify
Exit codes: 0 success, 1 a run or check failed, 2 wrong input.
"""

import argparse
import os
import shlex
import signal
import sys
from typing import Any

from fasttune import __version__, errors, hub, system
from fasttune.errors import ConfigError, FasttuneError

EXAMPLES = """examples:
  fasttune init quickstart
  fasttune train configs/quickstart.yaml
  fasttune train configs/smollm2_135m_gsm8k.yaml data.train=rows.jsonl train.max_steps=20
  fasttune plan configs/quickstart.yaml --gpu h100-80 --usd-per-hour 2.50
  fasttune data configs/quickstart.yaml --rows 5
  fasttune bench configs/smollm2_135m_gsm8k.yaml data.train=rows.jsonl --repeats 5
  fasttune eval runs/first-20261121-120000 runs/second-20261121-130000 --tasks builtin:arithmetic
  fasttune generate runs/quickstart-20261121-120000 --prompt 'What is 12 + 30?'
  fasttune merge runs/quickstart-20261121-120000 --out merged
  fasttune verify --quick
"""
PATHS = ("config", "data", "file", "model", "others", "out", "output", "resume")  # of the options
NUMBERS = {  # option → the least and the most it may be
    "batch_rows": (1, 100_000),
    "gpus": (1, 1024),
    "limit": (1, 10**9),
    "max_new_tokens": (1, 10**6),
    "nodes": (1, 10_000),
    "repeats": (1, 1000),
    "rows": (0, 100_000),
    "seed": (0, 2**32 - 1),
    "steps": (1, 100_000),
}
KEPT = "; what is finished is kept, and the same command continues from it"
Done = tuple[int, Any]  # the exit code, and what --json prints


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if argv is None:
        system.leave_current_folder()
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
        _check_limits(options)
        from fasttune import hardware

        several = options.command in ("train", "bench") and options.gpus  # each process that it starts takes one
        if options.command not in ("init", "schema") and hardware.has_nvidia_smi() and not several:
            from fasttune import gpus

            gpus.pin()
        code, document = options.run(options)
    except KeyboardInterrupt as error:
        print(f"fasttune: interrupted{options.interrupted}", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    except FasttuneError as error:
        if options.debug:
            raise
        for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
            print(errors.one_line(f"fasttune: {problem}"), file=sys.stderr)
        return error.exit_code
    try:
        if options.json:
            from fasttune import report

            print(report.to_json_line(document))
        sys.stdout.flush()
    except BrokenPipeError:
        return _stdout_is_closed()
    return code


def _stdout_is_closed() -> int:
    """The exit code where nobody reads stdout any more, as behind `| head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes there when Python ends
    return 128 + signal.SIGPIPE


def _check_limits(options: argparse.Namespace) -> None:
    """Names that no disk can have, and numbers that only a slip of the hand makes: nothing loops over those."""
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        for path in (value if isinstance(value, list) else [value]) if name in PATHS else []:
            if not path or "=" in path:  # train's config may be missing before a key=value
                continue
            try:
                system.path_text(path)
            except ValueError as error:
                shown = {"config": "config", "model": "model", "others": "model"}.get(name, flag)
                raise FasttuneError(f"{shown}: {error}") from error
        least, most = NUMBERS.get(name, (None, None))
        if name == "gpus" and isinstance(value, str):  # train's, which may be `all`
            continue
        if value is not None and least is not None and not least <= value <= most:
            raise FasttuneError(f"{flag} {value}: a whole number from {least} to {most:,}")


def parser() -> argparse.ArgumentParser:
    top = errors.Parser(
        prog="fasttune",
        description="Fine-tune an open model on one GPU as fast as the chip allows, with a report behind every number.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fasttune {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("verify", help="check this environment and print the command that fixes each problem")
    _with_config(commands)
    _with_model(commands)
    commands.add_parser("completion", help="what makes a shell complete these commands: bash, zsh or fish")
    return top


def _command(commands: Any, name: str, about: str, run: Any, interrupted: str = "") -> argparse.ArgumentParser:
    """The parser of a command that `run` runs; `interrupted`: what is said when it is."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=about)
    command.set_defaults(run=run, interrupted=interrupted, overrides=[])
    command.add_argument("--json", action="store_true", help="print the result as the last line of stdout")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _with_config(commands: Any) -> None:
    def command(name: str, about: str, run: Any, interrupted: str = "") -> Any:
        made = _command(commands, name, about, run, interrupted)
        made.add_argument("config", nargs="?" if name == "train" else None, help="a YAML file, see configs/")
        made.add_argument("overrides", nargs="*", metavar="key=value", help="settings that overrule the file")
        return made.add_argument

    ready = _command(commands, "init", "a ready config to edit, with every setting explained", init).add_argument
    ready("recipe", nargs="?", metavar="RECIPE", help="which; without one they are listed")
    ready("--out", default="config.yaml", metavar="FILE", help="default config.yaml; it must not be there")
    _command(commands, "schema", "the JSON schema of configs, for editors", schema)

    price = {"type": float, "metavar": "X", "help": "price of the machine"}
    add = command("train", "fine-tune a model as a config says", train, " before the first step; nothing was trained")
    found = "resume from the newest checkpoint in RUN (default: output_dir, or the newest runs/NAME-*)"
    add("--resume", nargs="?", const="", metavar="RUN", help=found)
    add("--gpus", metavar="N", help="on N GPUs of this machine, or `all`; without GPUs in N processes on the CPU")
    kinds = ("slurm", "torchrun", "skypilot", "kubeflow")
    add("--print-launch", choices=kinds, help="print what starts this on --nodes machines of --gpus each, and end")
    add("--nodes", type=int, metavar="N", help="machines, with --print-launch (default 1)")

    add = command("data", "show the rows as they will be trained; trains nothing", data)
    add("--rows", type=int, default=3, metavar="N", help="rows to print (default 3)")

    about, lost = "plain text as Megatron's .bin and .idx, in the tokenisation of the config", "; nothing was written"
    add = command("tokenize", about, tokenize, lost)
    add("--out", required=True, metavar="PREFIX", help="PREFIX.bin and PREFIX.idx, which must not be there")

    add = command("plan", "settings, memory, time and cost of a run; trains nothing", plan)
    add("--gpu", metavar="GPU", help="plan for another GPU than this machine's: h100-80, h200-141, l40s-48 …")
    add("--gpus", type=int, default=1, metavar="N", help="on N such GPUs of each machine")
    add("--nodes", type=int, default=1, metavar="N", help="on N machines")
    add("--usd-per-hour", **price)

    add = command("bench", "the same job on several arms, with the losses compared", bench, KEPT)
    add("--arms", help="comma-separated; default: fasttune,vanilla,hf-tuned,unsloth-notebook")
    add("--gpus", metavar="1,2", help="in place of arms: how `fasttune train` scales, from 1 GPU (or process) to 2")
    add("--repeats", type=int, default=5, metavar="N", help="repeats of each arm, interleaved (default 5)")
    add("--steps", type=int, metavar="N", help="optimizer steps of a repeat (default 6; 20 on a GPU)")
    add("--usd-per-hour", **price)
    add("--output", metavar="DIR", help="default runs/bench-NAME; an interrupted benchmark in it is continued")


def _with_model(commands: Any) -> None:
    def command(name: str, about: str, run: Any, interrupted: str = "") -> argparse.ArgumentParser:
        made = _command(commands, name, about, run, interrupted)
        kinds = ("RUN", "or a PEFT adapter") if name == "merge" else ("RUN|MODEL", "model folder, builtin: or hub id")
        made.add_argument("model", metavar=kinds[0], help=f"output folder of train, {kinds[1]}")
        made.add_argument("--trust-remote-code", action="store_true", help="run the model's own code: read it first")
        return made

    add = command("eval", "score a run or a model on tasks of EleutherAI's harness", evaluate, KEPT).add_argument
    own = "gsm8k_jsonl, multiple_choice_jsonl, builtin:arithmetic; filipino, pacute, … (docs/eval.md)"
    add("--tasks", metavar="A,B", help=f"{own}; or any of the harness")
    add("--data", metavar="FILE", help="rows of question and answer (and options); the folder of filipino, pacute, …")
    turns = "ask in the model's chat template, or not; default: as it was trained, filipino, pacute, … plainly"
    add("--chat-template", action=argparse.BooleanOptionalAction, help=turns)
    add("--limit", type=int, metavar="N", help="use only the first N problems of each task")
    add("--batch-rows", type=int, metavar="N", help="problems at once (default 16; 64 on a GPU)")
    add("--out", metavar="DIR", help="default: the run's folder, or runs/eval-NAME-DATE; of several runs/compare-DATE")
    add("--no-cache", action="store_true", help="neither use nor keep answers")
    add("others", nargs="*", metavar="RUN|MODEL", help="more of them: each is evaluated, then all compared and tested")

    made = command("generate", "answers of a run or a model, with its chat template", generate)
    what, add = made.add_mutually_exclusive_group(required=True), made.add_argument
    what.add_argument("--prompt", metavar="TEXT", help="answer this text, streaming to stdout")
    what.add_argument("--file", metavar="ROWS", help="answer every row, in any form of training rows or {prompt: …}")
    what.add_argument("--chat", action="store_true", help="a conversation; /new starts a new one, /exit ends it")
    add("--out", metavar="FILE", help="answers to --file (default ROWS.answers.jsonl here); continued if it is there")
    add("--system", metavar="TEXT", help="a system turn before the prompt")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="the longest answer (default 512)")
    add("--temperature", type=float, default=0.0, metavar="X", help="default 0: greedy")
    add("--seed", type=int, default=0, metavar="N", help="random seed of the sampling, with --temperature above 0")
    add("--batch-rows", type=int, metavar="N", help="rows of --file at once (default 8; 64 on a GPU)")
    add("--dtype", choices=["bf16", "fp32"], help="default: as trained on a GPU, fp32 on a CPU")

    about, lost = "adapter and base as one model that plain transformers loads", "; nothing was written"
    add = command("merge", about, merge, lost).add_argument
    add("--out", required=True, metavar="DIR", help="folder of the merged model")
    add("--dtype", choices=["bf16", "fp16", "fp32"], help="default: the dtype of the base's files")
    add("--overwrite", action="store_true", help="replace DIR once the new one is complete")
    kinds = ["bf16", "q8_0", "q4_k_m"]
    add("--gguf", choices=kinds, help="also DIR/*.gguf and a Modelfile (q4_k_m needs llama.cpp's llama-quantize)")
    add("--push-to-hub", metavar="REPO", help="upload DIR as owner/name, private if it is new")


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
    reporter = terminal.Reporter()
    try:
        asked = (options.repeats, options.steps, folder, command, reporter.progress, options.gpus)
        result = run.run(settings, names, *asked)
    finally:
        reporter.stop()
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

    try:
        return 0, generate.run(options)
    except BrokenPipeError:
        return _stdout_is_closed(), None


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


if __name__ == "__main__":
    sys.exit(main())
