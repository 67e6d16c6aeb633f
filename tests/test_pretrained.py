"""A model's files, which may come from anywhere: broken ones in one line, and no token without an embedding."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fasttune import cli, config
from fasttune.core import pretrained
from fasttune.errors import ConfigError, ModelError
from fasttune.settings import ModelConfig

pytestmark = pytest.mark.usefixtures("unsloth")


@pytest.fixture
def folder(unsloth: None, tmp_path: Path) -> Path:
    """A copy of builtin:tiny, to be spoiled."""
    return Path(shutil.copytree(pretrained.builtin("builtin:tiny"), tmp_path / "tiny"))


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10**5, "{}", '{"model_type": 5}', '{"model_type": "nosuch"}'])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_one_line(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text(text)
    read = pretrained.read_architecture if file == "config.json" else pretrained.read_tokenizer
    if file == "tokenizer_config.json" and text.startswith("{") and len(text) > 1:
        read(ModelConfig(name=str(folder)))
        return
    with pytest.raises(ModelError, match="model.name: ") as caught:
        read(ModelConfig(name=str(folder)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"vocab_size": -1}, "vocab_size -1"),
        ({"hidden_size": "x"}, "hidden_size"),
        ({"hidden_size": 8192, "num_hidden_layers": 100}, "more than its weights of"),
        ({"num_key_value_heads": "x"}, "damaged or not supported"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_anything_is_built(
    folder: Path, changes: dict[str, Any], told: str
) -> None:
    change(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=told):
        pretrained.read_architecture(ModelConfig(name=str(folder)))


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_that_breaks_at_a_text_is_one_line(folder: Path) -> None:
    file = folder / "tokenizer.json"
    for part in (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": {"type": "WordLevel"}},
    ):
        whole = json.loads(file.read_text())
        empty = {"vocab": {}, "unk_token": "x"} if "model" in part else {}
        file.write_text(json.dumps(whole | {key: {**value, **empty} for key, value in part.items()}))
        with pytest.raises(ModelError, match="damaged or not supported"):
            pretrained.read_tokenizer(ModelConfig(name=str(folder)))
        file.write_text(json.dumps(whole))


def test_an_id_beyond_all_embeddings_is_not_filled_up_to(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"vocab": {', '"vocab": {"far": 100000000,'))
    with pytest.raises(ModelError, match="has a token id above"):
        pretrained.read_tokenizer(ModelConfig(name=str(folder)))


def run_of(folder: Path, *settings: str) -> list[str]:
    (folder.parent / "rows.jsonl").write_text('{"question": "[CALL] 1", "answer": "2"}\n' * 8)
    tree = {"model": {"name": str(folder)}, "data": {"train": str(folder.parent / "rows.jsonl")}}
    (folder.parent / "run.yaml").write_text(json.dumps(tree | {"train": {"max_steps": 1, "batch_rows": 2}}))
    return [str(folder.parent / "run.yaml"), *settings]


@pytest.mark.parametrize("token", ["[CALL]", "[PAD]"])
@pytest.mark.parametrize("command", ["train", "data", "plan", "generate"])
def test_a_token_without_an_embedding_is_told_at_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_tokenizer: Any, command: str, token: str
) -> None:
    monkeypatch.chdir(folder.parent)
    arguments = run_of(folder, "model.max_length=64")
    if command == "generate":
        arguments = [str(folder), "--prompt", "a [CALL]"]
    if token == "[PAD]":
        tiny_tokenizer.add_special_tokens({"pad_token": token})
    else:
        tiny_tokenizer.add_tokens([token])
    tiny_tokenizer.save_pretrained(folder)
    assert cli.main([command, *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert repr(token) in line and "259 rows" in line and not Path("runs").exists()


def test_a_token_that_no_row_has_needs_no_embedding(folder: Path, tiny_tokenizer: Any) -> None:
    """Gemma 3: its tokenizer knows a token for pictures, of which its text models have no row."""
    tiny_tokenizer.add_tokens(["<image>"])
    pretrained.check_tokens(tiny_tokenizer, 259, [("row 1", tiny_tokenizer("no picture").input_ids)])
    with pytest.raises(ModelError, match="'<image>' .in row 2"):
        pretrained.check_tokens(tiny_tokenizer, 259, [("row 2", tiny_tokenizer("a <image>").input_ids)])


def test_rows_are_no_longer_than_the_model_has_positions(folder: Path) -> None:
    from fasttune.core import prepare

    change(folder / "config.json", max_position_embeddings=64)
    told: list[str] = []
    file, written = run_of(folder, "model.max_length=65")
    fitted, _ = prepare.fitted(config.load(file), told.append)
    assert fitted.model.max_length == 64 and "2,048 is more than the 64 positions" in told[0]
    with pytest.raises(ConfigError, match="set it to 64 or less"):
        prepare.fitted(config.load(file, [written]), told.append)
    assert prepare.fitted(config.load(file, ["model.max_length=64"]), told.append)[0].model.max_length == 64
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    change(folder / "config.json", rope_parameters=rope)
    assert prepare.fitted(config.load(file, ["model.max_length=256"]), told.append)[0].model.max_length == 256
    assert len(told) == 1
