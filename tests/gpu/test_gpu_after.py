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


class Silent:
    def __getattr__(self, name: str) -> object:
        return lambda *arguments, **keywords: None


@pytest.fixture(scope="module")
def finished(unsloth: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from fasttune import config, train

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
    return folder, train.run(config.parse(tree), Silent())


def command(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "fasttune.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_held_out_loss_is_that_of_plain_transformers(finished: tuple[Path, Any]) -> None:
    import peft
    import transformers

    from fasttune import builtin, config
    from fasttune.data import load, sources, tokens

    folder, result = finished
    assert result.status == "completed" and result.held_out.after.loss < result.held_out.before.loss
    base = transformers.AutoModelForCausalLM.from_pretrained(builtin.path("builtin:tiny"), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "adapter")
    form = load.form_of(config.load(folder / "config.yaml"), "builtin:arithmetic")
    encoder = tokens.Encoder(tokens.recipe_of(tokenizer, form, {}, "assistant", 512, "truncate"))
    (chunk,) = sources.read("builtin:arithmetic", "test", max_rows=20)
    block, at, loss, count = encoder.encode(chunk), 0, 0.0, 0
    for length in block.lengths:
        ids = torch.tensor(block.ids[at : at + length][None].astype("int64"))
        labels = torch.tensor(tokens.labels(block.ids[at : at + length], block.learned[at : at + length]))
        at += length
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        loss += float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
        count += int((labels[1:] != -100).sum())
    best = result.held_out.best
    assert result.held_out.saved_step == best.step
    assert best.loss == pytest.approx(loss / count, rel=LOSS_RELATIVE)


def test_answers_and_the_merge(finished: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = finished
    assert command("generate", str(folder), "--prompt", "2 + 3?", "--max-new-tokens", "8")
    done = json.loads(command("merge", str(folder), "--out", str(tmp_path / "merged"), "--json").splitlines()[-1])
    assert done["verified"]
    assert (tmp_path / "merged" / "model.safetensors").is_file()
