"""model.added_tokens: rows of embeddings and head for texts that become tokens; trained, saved, loaded by others."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import learned, losses, run, settings, whole_and_copy

from fasttune import cli
from fasttune.bench.run import checked_arms
from fasttune.core import pretrained, sharded
from fasttune.data import megatron
from fasttune.errors import ConfigError, FasttuneError, ModelError
from fasttune.settings import ModelConfig

pytestmark = pytest.mark.usefixtures("unsloth")

TOKENS = ["bahay", " isda"]
TEXT = "ang bahay at isda"
PLAIN = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
text, folder, kind = sys.argv[1:]
made = {"adapter": AutoPeftModelForCausalLM, "model": AutoModelForCausalLM}[kind]
model, tokenizer = made.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
with torch.inference_mode():
    asked = tokenizer(text, return_tensors="pt")
    torch.save((asked["input_ids"], model(**asked).logits), f"{folder}/logits.pt")
assert "unsloth" not in sys.modules
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names: of the tiny model; of one whose head is its embedding; of one with rows to spare."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny, found = pretrained.builtin("builtin:tiny"), {"untied": "builtin:tiny"}
    for kind in ("tied", "spare"):
        model = AutoModelForCausalLM.from_pretrained(tiny, tie_word_embeddings=kind == "tied")
        if kind == "tied":
            model.tie_weights()
        else:
            model.resize_token_embeddings(len(model.get_input_embeddings().weight) + 8, mean_resizing=False)
        folder = tmp_path_factory.mktemp("base") / kind
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
        found[kind] = str(folder)
    return found


@pytest.mark.parametrize("kind", ["untied", "tied", "spare"])
def test_new_rows_are_the_mean_of_the_old_ones(bases: dict[str, str], kind: str) -> None:
    import torch

    from fasttune.core import model as models

    def load(tokens: list[str]) -> tuple[Any, Any]:
        asked = ModelConfig(name=bases[kind], max_length=64, added_tokens=tokens)
        return models.load(asked, "float32", "none", True, 0)

    (plain, before), (model, tokenizer) = load([]), load(TOKENS)
    count, ids = len(before), tokenizer.convert_tokens_to_ids(TOKENS)
    assert ids == [count, count + 1] and [ids[0] in tokenizer(TEXT)["input_ids"], len(tokenizer)] == [True, count + 2]
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
    ends = [(each.get_input_embeddings(), each.get_output_embeddings()) for each in (plain, model)]
    for old, new in zip(*ends, strict=True):
        assert len(new.weight) == (len(old.weight) if kind == "spare" else count + 2)
        assert torch.equal(new.weight[:count], old.weight[:count])
        torch.testing.assert_close(new.weight[ids], old.weight[:count].mean(0).expand(2, -1))
    assert (ends[1][0].weight is ends[1][1].weight) is (kind == "tied")


def changes(base: str, method: str, corpus: Path) -> dict[str, Any]:
    tree: dict[str, Any] = {"model": {"name": base, "max_length": 32, "added_tokens": TOKENS}}
    tree["data"] = {"train": str(corpus), "documents": "line", "layout": "concat", "max_rows": None}
    tree["train"] = {"method": method, "learning_rate": 1e-2}
    return tree | ({"lora": {"train_embeddings": True}} if method == "lora" else {})


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("untied", "lora"),
        ("tied", "full"),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in (("tied", "lora"), ("spare", "lora"), ("untied", "full"))
        ),
    ],
)
def test_they_are_trained_saved_loaded_by_others_merged_and_resumed(
    bases: dict[str, str], tmp_path: Path, kind: str, method: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from fasttune.core import model as models
    from fasttune.tools import merged_weights, trained_model

    corpus, draw = tmp_path / "a.txt", random.Random(0)
    corpus.write_text("".join(" ".join(draw.choices(TEXT.split(), k=20)) + "\n" for _ in range(40)))
    asked = changes(bases[kind], method, corpus)
    whole = whole_and_copy(tmp_path / "run", 5, asked)
    copy = whole.with_name("copy")
    shutil.rmtree(copy / "checkpoints" / "step-4")
    assert run(copy, asked, resume=True).resumed_from_step == 2
    assert learned(copy) == learned(whole) and losses(copy) == losses(whole)

    what = "adapter" if method == "lora" else "model"
    subprocess.run([sys.executable, "-c", PLAIN, TEXT, str(whole / what), what], check=True, capture_output=True)
    ids, plain = torch.load(whole / what / "logits.pt", weights_only=True)
    opened = trained_model.open_run(str(whole))
    model, tokenizer = trained_model.load(opened, "float32")
    new = tokenizer.convert_tokens_to_ids(TOKENS)
    assert tokenizer(TEXT)["input_ids"] == ids[0].tolist() and set(new) <= set(ids[0].tolist())
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)
    start, _ = models.load(ModelConfig(**asked["model"]), "float32", "none", True, 0)
    for end in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(each, end)().weight[new] for each in (start, model))
        assert ((after - before).abs().max(1).values > 1e-3).all(), "each of them was trained"
    if method == "lora":
        (merged := tmp_path / "merged").mkdir()
        merged_weights.write(merged_weights.plan(opened.base, opened.adapter), merged, None, lambda share: None)
        model = AutoModelForCausalLM.from_pretrained(merged)
        with torch.inference_mode():
            torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is (kind == "tied")


def test_every_command_has_the_same_tokens(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(f"{TEXT}\n" * 30)
    Path("c.yaml").write_text(
        "model: {name: builtin:tiny, max_length: 32, added_tokens: [bahay, ' isda']}\ntrain: {method: full}\n"
        "data: {train: a.txt, documents: line, layout: concat}\n"
    )
    assert cli.main(["tokenize", "c.yaml", "--out", "tokens"]) == 0
    tokenizer = pretrained.read_tokenizer(ModelConfig(name="builtin:tiny", added_tokens=TOKENS))
    document = megatron.read("tokens").tokens(0).tolist()
    assert document == [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id] and max(document) == len(tokenizer) - 1
    capsys.readouterr()
    for command, train in (("data", "a.txt"), ("plan", "tokens.bin"), ("data", "tokens.bin")):
        more = ["data.documents=null"] if train == "tokens.bin" else []
        assert cli.main([command, "c.yaml", f"data.train={train}", "--json", *more]) == 0
        told = json.loads(capsys.readouterr().out)
        assert command == "plan" or told["tokens"] == 30 * len(document)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"model": {"added_tokens": ["bahay"]}}, "set lora.train_embeddings=true or train.method=full"),
        ({"model": {"added_tokens": ["ng", "ng"]}, "train": {"method": "full"}}, "names a token twice"),
        ({"model": {"added_tokens": [" "]}, "train": {"method": "full"}}, "model.added_tokens"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, asked)
    assert told in str(caught.value)


def test_where_it_does_not_work_it_is_refused_by_name(tmp_path: Path) -> None:
    asked = settings(tmp_path, {"model": {"added_tokens": ["bahay"]}, "train": {"method": "full"}})
    with pytest.raises(FasttuneError, match=r"set model.added_tokens=\[\]"):
        sharded.check(asked)
    with pytest.raises(FasttuneError, match=r"add model.added_tokens=\[\]"):
        checked_arms(asked, None, 5, None)
    with pytest.raises(ModelError, match=r"model.added_tokens: 'b' is one token of this model already: remove it"):
        pretrained.read_tokenizer(ModelConfig(name="builtin:tiny", added_tokens=["bahay", "b"]))
