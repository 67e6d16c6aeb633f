"""Model families, built small at random: each trains, evaluates, saves and resumes, and plain transformers agrees."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tiny_run import learned, losses, run

from fasttune.errors import ModelError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unsloth")]

WINDOW = {"sliding_window": 24}  # shorter than the rows
LLAMA_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SEVEN = None  # the default of lora.targets
RELATIVE = 1e-4


@dataclass(frozen=True)
class Family:
    """A class of transformers, what sets it apart, the layers that get an adapter, and why its rows are padded."""

    kind: str
    own: dict[str, Any] = field(default_factory=dict)
    targets: list[str] | None = SEVEN
    padded: str | None = None


FAMILIES = {
    "llama-3.1": Family("Llama", {"rope_parameters": LLAMA_ROPE | {"original_max_position_embeddings": 64}}),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", {"head_dim": 16}),
    "qwen3-moe": Family(
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        ["q_proj", "k_proj", "v_proj", "o_proj"],  # transformers keeps experts as one tensor, not as layers
    ),
    "mistral": Family("Mistral", WINDOW),
    "gemma2": Family(
        "Gemma2",
        WINDOW | {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.0},
        padded="its attention caps scores (attn_logit_softcapping=1), which packs on a CPU do not",
    ),
    "gemma3": Family("Gemma3Text", WINDOW | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "phi3": Family("Phi3", targets=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "granite": Family(
        "Granite",
        {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    ),
    "olmo2": Family("Olmo2"),
}
BY_DAY = ("llama-3.1", "qwen3-moe", "gemma3")  # of full weights: those that differ most

# As the family's own code has it: eager attention, a row alone, no unsloth. Answers one request a line.
PLAIN = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
for line in sys.stdin:
    folder, rows, out = json.loads(line)
    kind = AutoPeftModelForCausalLM if folder.endswith("adapter") else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    total = count = 0
    with torch.no_grad():
        for ids, supervised in rows:
            ids, supervised = torch.tensor(ids), torch.tensor(supervised)
            logits = model(input_ids=ids[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[supervised[1:]]
            total, count = total + float(losses.sum()), count + len(losses)
    torch.save({"loss": total / count, "logits": logits, "unsloth": "unsloth" in sys.modules}, out)
    print("answered", flush=True)
"""


class Plain:
    """Another process with transformers and PEFT alone, for all tests of this file."""

    def __init__(self, folder: Path):
        self.folder, self.errors = folder, (folder / "errors.txt").open("w+")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen([sys.executable, "-c", PLAIN], text=True, **pipes)

    def ask(self, model: Path, rows: Any) -> tuple[float, Any]:
        """(loss over the supervised tokens of all rows, logits of the last row)."""
        import torch

        assert self.process.stdin and self.process.stdout
        plain_rows = [[ids.tolist(), supervised.tolist()] for ids, supervised in rows]
        self.process.stdin.write(json.dumps([str(model), plain_rows, str(self.folder / "answer")]) + "\n")
        self.process.stdin.flush()
        while (line := self.process.stdout.readline()) != "answered\n":
            assert line, (self.folder / "errors.txt").read_text()[-2000:]
        answer = torch.load(self.folder / "answer", weights_only=True)
        assert not answer["unsloth"]
        return answer["loss"], answer["logits"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    made = Plain(tmp_path_factory.mktemp("plain"))
    with made.process, made.errors:
        yield made
        assert made.process.stdin
        made.process.stdin.close()


def build(family: Family, folder: Path) -> Path:
    """A model folder with the tokenizer of builtin:tiny. Weights are large enough for attention to prefer something."""
    import torch
    import transformers

    from fasttune.core import pretrained

    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained.builtin("builtin:tiny"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 512}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = getattr(transformers, f"{family.kind}Config")(**sizes, **special, initializer_range=0.15, **family.own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def changes_for(family: Family, model: Path, method: str) -> dict[str, Any]:
    """Three steps on the same eight rows, so that the loss must fall. Full weights see one after the other."""
    train = {"max_steps": 3, "method": method, "micro_batch_rows": 8 if method == "lora" else 1}
    return {
        "model": {"name": str(model)},
        "data": {"max_rows": 8, "eval": "builtin:arithmetic"},
        "eval": {"rows": 4},
        "train": train | {"learning_rate": 1e-2 if method == "lora" else 1e-3},
        "lora": {"targets": family.targets} if family.targets else {},
        "checkpoint": {"every": "2 steps"},
    }


def by_night(name: str, method: str) -> Any:
    nightly = method == "full" and name not in BY_DAY
    return pytest.param(name, method, id=f"{name}-{method}", marks=[pytest.mark.nightly] * nightly)


@pytest.mark.parametrize(("name", "method"), [by_night(name, how) for how in ("lora", "full") for name in FAMILIES])
def test_a_family_is_trained_as_plain_transformers_computes_it(
    name: str, method: str, plain: Plain, tmp_path: Path
) -> None:
    import torch

    from fasttune.core import prepare, train

    family, folder, jobs = FAMILIES[name], tmp_path / "run", list[Any]()
    changes = changes_for(family, build(family, tmp_path / "model"), method)

    def copy(step: int) -> None:
        if step == 3:  # the last checkpoint is of step 2
            shutil.copytree(folder, tmp_path / "killed")

    def keep(*arguments: Any) -> Any:
        jobs.append(prepare.prepare(*arguments))
        return jobs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "prepare", keep)
        result = run(folder, changes, after=copy)
    (job,) = jobs
    assert (result.status, result.steps, result.error) == ("completed", 3, None)
    micro = 1 if method == "lora" else 8
    reasons = [warning for warning in result.warnings if warning.startswith("rows are padded, not packed")]
    assert reasons == ([f"rows are padded, not packed: {family.padded}"] if family.padded else [])
    assert result.backend.packing.startswith("padded" if family.padded else f"packed: 8 rows in {micro} micro-batch")

    seen = losses(folder)
    assert seen == sorted(seen, reverse=True) and seen[2] < seen[0]
    (rows,) = job.data.dealt(0)
    assert seen[0] == pytest.approx(plain.ask(tmp_path / "model", rows)[0], rel=RELATIVE)
    held_out, (held_out_rows,) = result.held_out, job.held_out.values()
    assert held_out.before.loss == pytest.approx(plain.ask(tmp_path / "model", held_out_rows)[0], rel=RELATIVE)
    assert held_out.after.loss < held_out.before.loss

    saved = folder / ("adapter" if method == "lora" else "model")
    if method == "full":
        made, given = (json.loads((each / "config.json").read_text()) for each in (saved, tmp_path / "model"))
        assert {key: made.get(key) for key in given} == given
    loss, logits = plain.ask(saved, held_out_rows)
    assert held_out.after.loss == pytest.approx(loss, rel=RELATIVE)
    with torch.inference_mode():
        own = job.model.eval()(input_ids=torch.tensor([held_out_rows[-1][0].tolist()])).logits[0]
    torch.testing.assert_close(logits, own, rtol=RELATIVE, atol=1e-3)

    again = run(tmp_path / "killed", changes, resume=True)
    assert (again.status, again.resumed_from_step) == ("completed", 2)
    assert (losses(tmp_path / "killed"), learned(tmp_path / "killed")) == (seen, learned(folder))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.targets is not SEVEN])
def test_layers_that_a_family_does_not_have_are_named_beside_those_it_has(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    changes = changes_for(family, build(family, tmp_path / "model"), "lora") | {"lora": {}}
    with pytest.raises(ModelError, match="lora.targets: this model has no .*gate_proj, up_proj") as caught:
        run(tmp_path / "run", changes)
    has = str(caught.value).partition("it has")[2]
    assert all(target in has for target in family.targets or ()) and "lm_head" not in has and "set lora.targets" in has
    assert not (tmp_path / "run").exists()
