"""Held-out loss, the best checkpoint, answers and a merge on a GPU: bf16 through Unsloth's own forward."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("unsloth"),
]

LOSS_RELATIVE = 1e-2  # bf16 against float32


@pytest.fixture(scope="module")
def finished(unsloth: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from fasttune import config, terminal
    from fasttune.core import train

    folder = tmp_path_factory.mktemp("after") / "run"
    tree = {
        "model": {"name": "builtin:tiny", "max_length": 512},
        "data": {"train": "builtin:arithmetic", "max_rows": 256, "eval": "builtin:arithmetic"},
        "lora": {"rank": 8, "alpha": 16},
        "train": {"batch_rows": 8, "max_steps": 20, "learning_rate": 1e-2},
        "eval": {"every": "5 steps", "rows": 20, "problems": 4, "keep_best": True},
        "samples": 1,
        "output_dir": str(folder),
    }
    return folder, train.run(config.parse(tree), terminal.Reporter(quiet=True))


def command(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "fasttune.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# In a process of its own: Unsloth patches transformers' rotary embedding for the whole process.
PLAIN_LOSS = """
import json, sys, torch, transformers, peft
base, adapter, rows = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, adapter).eval()
total, count = 0.0, 0
for ids, labels in json.loads(rows):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    labels = torch.tensor(labels[1:])
    total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
    count += int((labels != -100).sum())
print(total / count)
"""


def test_held_out_loss_is_that_of_plain_transformers(finished: tuple[Path, Any]) -> None:
    import transformers

    from fasttune import config
    from fasttune.core import pretrained
    from fasttune.data import load, sources, tokenize

    folder, result = finished
    assert result.status == "completed" and result.held_out.after.loss < result.held_out.before.loss
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "adapter")
    form, _ = load.form_of(config.load(folder / "config.yaml"), "builtin:arithmetic")
    encoder = tokenize.Encoder(tokenize.recipe_of(tokenizer, form, {}, "assistant", 512, "truncate"))
    (chunk,) = sources.read("builtin:arithmetic", "test", max_rows=20)
    block, at, rows = encoder.encode(chunk), 0, []
    for length in block.lengths:
        ids, learned = block.ids[at : at + length], block.supervised[at : at + length]
        rows.append((ids.tolist(), tokenize.labels(ids, learned).tolist()))
        at += length
    base = str(pretrained.builtin("builtin:tiny"))
    plain = [sys.executable, "-c", PLAIN_LOSS, base, str(folder / "adapter"), json.dumps(rows)]
    done = subprocess.run(plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    best = result.held_out.best
    assert result.held_out.saved_step == best.step
    assert best.loss == pytest.approx(float(done.stdout), rel=LOSS_RELATIVE)


def test_answers_and_the_merge(finished: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = finished
    assert command("generate", str(folder), "--prompt", "2 + 3?", "--max-new-tokens", "8")
    done = json.loads(command("merge", str(folder), "--out", str(tmp_path / "merged"), "--json").splitlines()[-1])
    assert done["verified"]
    assert (tmp_path / "merged" / "model.safetensors").is_file()
