"""The stages of the battery, as data. `{…}` is filled in by battery.py; benchmarks/README.md says how to run them.

Every benchmark takes 6 steps × 5 repeats; one that does not get through in its minutes goes on at the next call.
"""

from typing import NamedTuple


class Stage(NamedTuple):
    name: str
    minutes: float  # its limit, and what must be left of --minutes to begin it
    command: str  # or "skip: reason"
    small: str = ""  # what --dry-run adds to the command; later settings overrule earlier ones
    needs: str | None = None  # a module without which it is skipped


SMALL = "model.max_length=64 train.batch_rows=2 train.micro_batch_rows=1 --repeats 1 --steps 2"
ONE_ARM = f"{SMALL} --arms fasttune"
ANSWERS_FIT = "model.max_length=512"  # a row without its answer teaches nothing and is refused

# Rows of full length, so that a token's cost is that of the length; answers only where lengths are those of real rows.
FULL_4096 = "data.train={rows}/full-4096.jsonl"
FULL_1024 = "data.train={rows}/full-1024.jsonl model.max_length=1024 train.batch_rows=16 train.micro_batch_rows=8"
# As many rows at once as padded arms have room for: 16 rows of GSM8K are padded to about 6,000 positions.
GSM8K, ALPACA = (
    f"data.train={{rows}}/{name}.jsonl data.train_on=assistant model.max_length=2048 "
    f"train.batch_rows=64 train.micro_batch_rows={at_once}"
    for name, at_once in (("gsm8k", 16), ("alpaca", 8))
)
R16, R64 = "lora.rank=16 lora.alpha=32", "lora.rank=64 lora.alpha=16"


def bench(settings: str, arms: str = "fasttune,vanilla,hf-tuned,unsloth-notebook") -> str:
    return (
        f"{{python}} -m fasttune.cli bench benchmarks/battery.yaml name={{stage}} model.name={{model}} {settings} "
        f"--repeats 5 --steps 6 --arms {arms} --output {{out}}/{{stage}} --json"
    )


# Against the fasttune arm of lora-r64-2048-gsm8k, which takes the variable-length kernel (fasttune.core.model). Unsloth
# reads it (unsloth/utils/attention_dispatch.py) and by us; what ran is in the result.
PER_SEGMENT = "env UNSLOTH_TORCH_VARLEN=0 "
CANARY = (
    "{python} -m fasttune.cli train benchmarks/battery.yaml name={stage} model.name=builtin:tiny model.max_length=512 "
    "data.train=builtin:arithmetic train.batch_rows=8 train.max_steps=3 output_dir={out}/{stage} overwrite=true --debug"
)

# The order is that of their worth: a card may be there for half an hour only.
STAGES = [
    Stage("canary", 2, CANARY),
    Stage("lora-r64-2048-gsm8k", 9, bench(f"{R64} {GSM8K}"), f"{ONE_ARM} {ANSWERS_FIT}"),
    Stage("lora-r16-4096", 9, bench(f"{R16} {FULL_4096}"), SMALL),
    Stage("ceilings", 2, "{python} benchmarks/ceilings.py", "--tiny"),
    Stage("gpu-tests", 8, "{python} -m pytest -q -p no:cacheprovider -W default -m gpu tests/gpu", needs="pytest"),
    Stage("verify", 8, "{python} -m fasttune.verify --json", "--quick"),
    Stage("lora-r16-1024", 9, bench(f"{R16} {FULL_1024}"), ONE_ARM),
    Stage("attention-per-segment", 8, PER_SEGMENT + bench(f"{R64} {GSM8K}", "fasttune"), f"{SMALL} {ANSWERS_FIT}"),
    *(
        Stage(
            f"checkpointing-{policy}",
            8,
            bench(f"{R16} {FULL_4096} train.gradient_checkpointing={policy}", "fasttune"),
            SMALL,
        )
        for policy in ("none", "full", "unsloth")
    ),
    Stage("full-1024", 9, bench(f"train.method=full {FULL_1024}", "fasttune,vanilla"), SMALL),
    Stage("lora-r16-2048-alpaca", 9, bench(f"{R16} {ALPACA}"), f"{ONE_ARM} {ANSWERS_FIT}"),
    Stage("nf4-1024", 8, bench(f"{R16} {FULL_1024} model.quantization=nf4", "fasttune"), SMALL, needs="bitsandbytes"),
    Stage("fp8-1024", 0, "skip: Unsloth has FP8 base weights (load_in_fp8), but fasttune has no setting for them yet"),
]
# Made before the first stage that reads {model} or {rows}, where they are not there yet.
INPUTS = [
    Stage("rows", 1, "{python} benchmarks/inputs.py rows"),
    Stage("model", 9, "{python} benchmarks/inputs.py model", "--tiny"),
]
