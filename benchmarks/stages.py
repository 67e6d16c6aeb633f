"""The stages of the battery, as data. `{…}` is filled in by battery.py; benchmarks/README.md says how to run them.

Every benchmark takes 6 steps × 5 repeats; one that does not get through in its minutes resumes at the next call.
"""

from typing import NamedTuple


class Stage(NamedTuple):
    name: str
    minutes: float  # its limit, and what must be left of --minutes to begin it
    command: str  # or "skip: reason"
    small: str = ""  # what --dry-run adds to the command (later settings overrule earlier ones), or "skip: reason"
    needs: str | None = None  # a module without which it is skipped


SMALL = "model.max_length=64 train.batch_rows=2 train.micro_batch_rows=1 --repeats 1 --steps 2"
ONE_ARM = f"{SMALL} --arms fasttune"
ANSWERS_FIT = "model.max_length=512"  # a row without its answer teaches nothing and is refused

# Rows at once are what the plain arms have room for on an H100, the same for all; more of them is refused by
# tests/rehearsal/test_battery_memory.py. A pack of ours holds rows at once × max_length tokens, which is why that is
# longer than full rows.
# Rows of full length, so that a token's cost is that of the length; answers only where lengths are those of real rows.
FULL_4096 = "data.train={rows}/full-4096.jsonl model.max_length=8192 train.micro_batch_rows=1"
FULL_1024 = "data.train={rows}/full-1024.jsonl model.max_length=2048 train.batch_rows=16 train.micro_batch_rows=4"
GSM8K, ALPACA = (
    f"data.train={{rows}}/{name}.jsonl data.train_on=assistant model.max_length=2048 "
    "train.batch_rows=64 train.micro_batch_rows=8"
    for name in ("gsm8k", "alpaca")
)
# A pack of ours takes all 16 rows: 880 + 16 × about 200 tokens.
SHARED_PROMPT = (
    "data.train={rows}/shared-prompt.jsonl data.train_on=assistant model.max_length=2560 "
    "train.batch_rows=16 train.micro_batch_rows=2"
)
R16, R64 = "lora.rank=16 lora.alpha=32", "lora.rank=64 lora.alpha=16"


def bench(settings: str, arms: str = "fasttune,vanilla,hf-tuned,unsloth-notebook") -> str:
    return (
        f"{{python}} -m fasttune.cli bench benchmarks/battery.yaml name={{stage}} model.name={{model}} {settings} "
        f"--repeats 5 --steps 6 --arms {arms} --output {{out}}/{{stage}} --json"
    )


# Unsloth's own switches, each against the stage of the same job without it; what ran is in the result.
# Packs as one SDPA call a segment, not by the variable-length kernel (unsloth/utils/attention_dispatch.py).
PER_SEGMENT = "env UNSLOTH_TORCH_VARLEN=0 "
# Torch's own Flash Attention 2 where `auto` takes FA3, as it does by itself on a Hopper that has it
# (unsloth/utils/flash_impl.py). `fa3` is what `auto` is there, and the packages of FA4 have no backward.
BUNDLED = "env UNSLOTH_FLASH_ATTENTION_IMPL=off "
# Unsloth's batching padded, in compiled blocks: never measured on a Hopper, so `auto` never takes it there
# (unsloth/utils/padding_choice.py). It reads it for its own collator only: our arm pads by train.packing=false.
PADDED = "env UNSLOTH_PADDING_CHOICE=padded "
# Without torch.compile of every block, which rows of one length get and packs of many lengths do not.
UNCOMPILED = "env UNSLOTH_BLOCK_COMPILE=0 "
SAME_COMMAND = "skip: attention-per-segment tries such a command"  # in a dry run
# What no rehearsal on a CPU reaches (docs/measuring.md): bf16 under autocast, offloaded checkpointing, and, at
# 160 tokens, in every step rectangles of two equal rows as well as packs of unequal ones.
CANARY = (
    "{python} -m fasttune.cli train benchmarks/battery.yaml name={stage} model.name=builtin:tiny model.max_length=160 "
    "data.train=builtin:arithmetic train.batch_rows=8 train.max_steps=3 train.gradient_checkpointing=unsloth "
    "output_dir={out}/{stage} overwrite=true --debug"
)

# The order is that of their worth: a card may be there for half an hour only.
STAGES = [
    Stage("canary", 2, CANARY),
    Stage("lora-r64-2048-gsm8k", 9, bench(f"{R64} {GSM8K}"), f"{ONE_ARM} {ANSWERS_FIT}"),
    Stage("lora-r16-4096", 9, bench(f"{R16} {FULL_4096}"), SMALL),
    Stage("lora-r16-shared-prompt", 9, bench(f"{R16} {SHARED_PROMPT}"), f"{ONE_ARM} model.max_length=2048"),
    Stage("ceilings", 2, "{python} benchmarks/ceilings.py", "--tiny"),
    Stage("gpu-tests", 8, "{python} -m pytest -q -p no:cacheprovider -W default -m gpu tests/gpu", needs="pytest"),
    Stage("verify", 8, "{python} -m fasttune.verify --json", "--quick"),
    Stage("lora-r16-1024", 9, bench(f"{R16} {FULL_1024}"), ONE_ARM),
    Stage("attention-per-segment", 8, PER_SEGMENT + bench(f"{R64} {GSM8K}", "fasttune"), f"{SMALL} {ANSWERS_FIT}"),
    Stage("attention-bundled", 8, BUNDLED + bench(f"{R64} {GSM8K}", "fasttune"), SAME_COMMAND, "flash_attn_interface"),
    Stage("blocks-uncompiled", 8, UNCOMPILED + bench(f"{R16} {FULL_4096}", "fasttune"), SAME_COMMAND),
    Stage(
        "blocks-padded",
        9,
        PADDED + bench(f"{R64} {GSM8K} train.packing=false", "fasttune,unsloth-notebook"),
        SAME_COMMAND,
    ),
    *(
        Stage(
            f"checkpointing-{policy}",
            8,
            bench(f"{R16} {FULL_4096} train.gradient_checkpointing={policy}", "fasttune"),
            SMALL,
        )
        for policy in ("none", "full", "unsloth")
    ),
    Stage("full-1024", 9, bench(f"train.method=full {FULL_1024} train.micro_batch_rows=1", "fasttune,vanilla"), SMALL),
    Stage("lora-r16-2048-alpaca", 9, bench(f"{R16} {ALPACA}"), f"{ONE_ARM} {ANSWERS_FIT}"),
    Stage("nf4-1024", 8, bench(f"{R16} {FULL_1024} model.quantization=nf4", "fasttune"), SMALL, needs="bitsandbytes"),
    Stage("fp8-1024", 0, "skip: Unsloth has FP8 base weights (load_in_fp8), but fasttune has no setting for them yet"),
]
# Made before the first stage that reads {model} or {rows}, where they are not there yet.
INPUTS = [
    Stage("rows", 1, "{python} benchmarks/inputs.py rows"),
    Stage("model", 9, "{python} benchmarks/inputs.py model", "--tiny"),
]
