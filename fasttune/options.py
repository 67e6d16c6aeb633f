"""What each command takes: the parser, and the limits of numbers and names. What it does: cli.py."""

import argparse
from typing import Any

from fasttune import __version__, errors, system
from fasttune.errors import FasttuneError

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
WRITTEN = ("out", "output")
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


def check_limits(options: argparse.Namespace) -> None:
    """Names that no disk can have, and numbers that only a slip of the hand makes: nothing loops over those."""
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        for path in (value if isinstance(value, list) else [value]) if name in PATHS else []:
            if path is None or "=" in path or (not path and name == "resume"):  # which stands alone, too
                continue
            try:
                system.path_text(path)
            except ValueError as error:
                shown = {"config": "config", "model": "model", "others": "model"}.get(name, flag)
                raise FasttuneError(f"{shown}: {error}") from error
            if name in WRITTEN and any(character < " " or character == "\x7f" for character in path):
                told = f"{errors.one_line(path, 100)!r} holds a control character"  # no command could be shown with it
                raise FasttuneError(f"{flag}: {told}: write the name without it")
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


def _command(commands: Any, name: str, about: str, interrupted: str = "") -> argparse.ArgumentParser:
    """`interrupted`: what is said when it is."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=about)
    command.set_defaults(interrupted=interrupted, overrides=[])
    command.add_argument("--json", action="store_true", help="print the result as the last line of stdout")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _with_config(commands: Any) -> None:
    def command(name: str, about: str, interrupted: str = "") -> Any:
        made = _command(commands, name, about, interrupted)
        made.add_argument("config", nargs="?" if name == "train" else None, help="a YAML file, see configs/")
        made.add_argument("overrides", nargs="*", metavar="key=value", help="settings that overrule the file")
        return made.add_argument

    ready = _command(commands, "init", "a ready config to edit, with every setting explained").add_argument
    ready("recipe", nargs="?", metavar="RECIPE", help="which; without one they are listed")
    ready("--out", metavar="FILE", help="default config.yaml; it must not be there")
    _command(commands, "schema", "the JSON schema of configs, for editors")

    price = {"type": float, "metavar": "X", "help": "price of the machine"}
    add = command("train", "fine-tune a model as a config says", " before the first step; nothing was trained")
    found = "resume from the newest checkpoint in RUN (default: output_dir, or the newest runs/NAME-*)"
    add("--resume", nargs="?", const="", metavar="RUN", help=found)
    add("--gpus", metavar="N", help="on N GPUs of this machine, or `all`; without GPUs in N processes on the CPU")
    kinds = ("slurm", "torchrun", "skypilot", "kubeflow")
    add("--print-launch", choices=kinds, help="print what starts this on --nodes machines of --gpus each, and end")
    add("--nodes", type=int, metavar="N", help="machines, with --print-launch (default 1)")

    add = command("data", "show the rows as they will be trained; trains nothing")
    add("--rows", type=int, default=3, metavar="N", help="rows to print (default 3)")

    about, lost = "plain text as Megatron's .bin and .idx, in the tokenisation of the config", "; nothing was written"
    add = command("tokenize", about, lost)
    add("--out", required=True, metavar="PREFIX", help="PREFIX.bin and PREFIX.idx, which must not be there")

    add = command("plan", "settings, memory, time and cost of a run; trains nothing")
    add("--gpu", metavar="GPU", help="plan for another GPU than this machine's: h100-80, h200-141, l40s-48 …")
    add("--gpus", type=int, default=1, metavar="N", help="on N such GPUs of each machine")
    add("--nodes", type=int, default=1, metavar="N", help="on N machines")
    add("--usd-per-hour", **price)

    add = command("bench", "the same job on several arms, with the losses compared", KEPT)
    add("--arms", help="comma-separated; default: fasttune,vanilla,hf-tuned,unsloth-notebook")
    add("--gpus", metavar="1,2", help="in place of arms: how `fasttune train` scales, from 1 GPU (or process) to 2")
    add("--repeats", type=int, default=5, metavar="N", help="repeats of each arm, interleaved (default 5)")
    add("--steps", type=int, metavar="N", help="optimizer steps of a repeat (default 6; 20 on a GPU)")
    add("--usd-per-hour", **price)
    add("--output", metavar="DIR", help="default runs/bench-NAME; an interrupted benchmark in it is continued")


def _with_model(commands: Any) -> None:
    def command(name: str, about: str, interrupted: str = "") -> argparse.ArgumentParser:
        made = _command(commands, name, about, interrupted)
        kinds = ("RUN", "or a PEFT adapter") if name == "merge" else ("RUN|MODEL", "model folder, builtin: or hub id")
        made.add_argument("model", metavar=kinds[0], help=f"output folder of train, {kinds[1]}")
        made.add_argument("--trust-remote-code", action="store_true", help="run the model's own code: read it first")
        return made

    add = command("eval", "score a run or a model on tasks of EleutherAI's harness", KEPT).add_argument
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

    made = command("generate", "answers of a run or a model, with its chat template")
    what, add = made.add_mutually_exclusive_group(required=True), made.add_argument
    what.add_argument("--prompt", metavar="TEXT", help="answer this text, streaming to stdout")
    what.add_argument("--file", metavar="ROWS", help="answer every row, in any form of training rows or {prompt: …}")
    what.add_argument("--chat", action="store_true", help="a conversation; /new starts a new one, /exit ends it")
    add("--out", metavar="FILE", help="answers to --file (default ROWS.answers.jsonl here); continued if it is there")
    add("--system", metavar="TEXT", help="a system turn before the prompt")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="the longest answer (default 512)")
    add("--temperature", type=float, default=0.0, metavar="X", help="default 0: greedy")
    add("--seed", type=int, metavar="N", help="random seed of the sampling (default 0), with --temperature above 0")
    add("--batch-rows", type=int, metavar="N", help="rows of --file at once (default 8; 64 on a GPU)")
    add("--dtype", choices=["bf16", "fp32"], help="default: as trained on a GPU, fp32 on a CPU")

    about, lost = "adapter and base as one model that plain transformers loads", "; nothing was written"
    add = command("merge", about, lost).add_argument
    add("--out", required=True, metavar="DIR", help="folder of the merged model")
    add("--dtype", choices=["bf16", "fp16", "fp32"], help="default: the dtype of the base's files")
    add("--overwrite", action="store_true", help="replace DIR once the new one is complete")
    kinds = ["bf16", "q8_0", "q4_k_m"]
    add("--gguf", choices=kinds, help="also DIR/*.gguf and a Modelfile (q4_k_m needs llama.cpp's llama-quantize)")
    add("--push-to-hub", metavar="REPO", help="upload DIR as owner/name, private if it is new")
