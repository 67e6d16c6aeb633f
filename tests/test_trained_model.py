"""Adapters of others: used where every weight finds its layer, else refused in one line by every command."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttune import cli
from fasttune.core import model_files, pretrained
from fasttune.errors import ModelError
from fasttune.settings import ModelConfig
from fasttune.tools import merged_weights, trained_model

pytestmark = pytest.mark.usefixtures("unsloth")

SLOW = r"([a-z_.0-9]+)*!"  # each name takes it 2**50 tries


def changed(run: Path, folder: Path, rename: Callable[[str], str | None] = str, **settings: Any) -> Path:
    """A copy of a run's adapter, with its weights under other names (None: left out) and other settings."""
    import safetensors.torch

    shutil.copytree(run / "adapter", folder)
    weights = safetensors.torch.load_file(folder / trained_model.WEIGHTS)
    renamed = {new: weight for name, weight in weights.items() if (new := rename(name))}
    safetensors.torch.save_file(renamed, folder / trained_model.WEIGHTS)
    said = json.loads((folder / trained_model.SETTINGS).read_text()) | {"base_model_name_or_path": "builtin:tiny"}
    (folder / trained_model.SETTINGS).write_text(json.dumps(said | settings))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The one line of a command that exits with 2."""
    assert cli.main([*command]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fasttune: ") and len(line) <= 310 and "Traceback" not in line
    return line


@pytest.mark.parametrize(
    ("rename", "told"),
    [
        (
            lambda name: name.replace("model.layers", "model.language_model.layers"),
            "28 of the adapter's 28 weights have no layer",
        ),
        (
            lambda name: name.removeprefix(trained_model.PREFIX),
            "no layer in the base, e.g. model.layers.0.*base_model.model",
        ),
        (lambda name: name if "layers.0" in name else None, "no weights for 14 of those .*layers.1.*get it again"),
        (lambda name: name.replace("layers.1", "layers.7"), "14 of the adapter's 28 weights have no layer"),
    ],
)
def test_an_adapter_that_does_not_fit_is_no_answer_of_the_base(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rename: Any, told: str
) -> None:
    folder = str(changed(finished_run, tmp_path / "adapter", rename))
    for command in (["generate", folder, "--prompt", "hi"], ["merge", folder, "--out", str(tmp_path / "out")]):
        line = refused(capsys, *command)
        assert re.search(told, line) and "base_model_name_or_path" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target_modules": SLOW}, "take too long"),
        ({"target_modules": "("}, "damaged \\("),
        ({"r": 10**8}, "says rank 100,000,000, its weights have at most 4"),
        ({"rank_pattern": {"q_proj": 10**8}}, "says rank 100,000,000"),
        ({"lora_alpha": None}, "lora_alpha: is null"),
        ({"peft_type": "XLORA"}, "peft_type: input should be 'LORA', got 'XLORA'"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern.q_proj: input should be a valid number"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication is not supported"),
        ({"init_lora_weights": "pissa_niter_1000000000"}, "got 'pissa_niter_1000000000'"),
        ({"base_model_name_or_path": {}}, "base_model_name_or_path: input should be a valid string, got {}"),
        ({"base_model_name_or_path": "/gone/Base-7B"}, "which is not here; set it to"),
    ],
)
def test_settings_of_others_are_bounded(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], told: str
) -> None:
    """By what generate, eval and merge have in common."""
    from fasttune.core import model

    monkeypatch.setattr(trained_model, "MATCHING_CPU_S", 0.2)
    folder = changed(finished_run, tmp_path / "adapter", **settings)
    with pytest.raises(ModelError, match=told) as caught:
        opened = trained_model.open_run(str(folder))
        trained_model.put_on(model.load(opened.base, "float32", "none", False, 0)[0], folder)
    assert "\n" not in str(caught.value)


def test_weights_that_are_a_pickle_a_pipe_or_nothing(finished_run: Path, tmp_path: Path, capsys: Any) -> None:
    folder = changed(finished_run, tmp_path / "adapter")
    (folder / trained_model.WEIGHTS).rename(folder / "adapter_model.bin")
    for command in (["generate", "--prompt", "hi"], ["merge", "--out", str(tmp_path / "x")], ["eval"]):
        assert "a pickle (adapter_model.bin)" in refused(capsys, command[0], str(folder), *command[1:])
    (folder / "adapter_model.bin").unlink()
    os.mkfifo(folder / trained_model.WEIGHTS)
    with pytest.raises(ModelError, match=f"has no {trained_model.WEIGHTS}"):
        trained_model.adapter_settings(folder)
    for text in ("", "[]", "[" * 10**5, "{"):
        (folder / trained_model.SETTINGS).write_text(text)
        with pytest.raises(ModelError, match=r"adapter_config.json: cannot be read"):
            trained_model.adapter_settings(folder)


@pytest.mark.parametrize("kind", ["folder", "with a config", "run", "gone", "hub"])
def test_an_adapter_is_no_model_to_train(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, kind: str
) -> None:

    name, told = str(finished_run / "adapter"), "fasttune merge"
    if kind == "with a config":
        name = str(changed(finished_run, tmp_path / "adapter"))
        shutil.copy(pretrained.builtin("builtin:tiny") / "config.json", name)
    elif kind == "run":
        name = str(finished_run)
    elif kind == "gone":
        name, told = "/gone/Base-7B", "no such folder"
    elif kind == "hub":
        name, told = "o/adapter", "hf download o/adapter"
        monkeypatch.setattr("transformers.utils.peft_utils.find_adapter_config_file", lambda *_, **__: "x")
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{name: {name}}}\ndata: {{train: builtin:arithmetic}}\noutput_dir: {tmp_path / 'out'}\n")
    for command in ("train", "plan", "data", "bench") if kind == "folder" else ("train",):
        line = refused(capsys, command, str(config))
        assert told in line and ("is an adapter, no model" in line or kind == "gone")
    assert not (tmp_path / "out").exists()


def test_patterns_of_ordinary_adapters_are_as_peft_takes_them(finished_run: Path, tmp_path: Path) -> None:
    pattern = r".*\.(q|k|v|o|gate|up|down)_proj"
    folder = changed(finished_run, tmp_path / "adapter", target_modules=pattern)
    plan = merged_weights.plan(ModelConfig(name="builtin:tiny"), folder)
    assert plan.deltas == merged_weights.plan(ModelConfig(name="builtin:tiny"), finished_run / "adapter").deltas
    assert model_files.read_json(folder / trained_model.SETTINGS)["target_modules"] == pattern


def test_a_mistyped_run_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("old-1", "new-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    os.utime("runs/old-1/config.yaml", (1, 1))
    with pytest.raises(ModelError, match=r"no such run in runs/; the newest there: runs/new-2, runs/old-1"):
        trained_model.open_run("runs/nww-2")
    assert trained_model.open_run("owner/name").base.name == "owner/name"


def test_rows_of_the_run_are_read_as_it_read_them(finished_run: Path) -> None:
    from dataclasses import replace

    opened = trained_model.open_run(str(finished_run))
    assert opened.config
    data = opened.config.data.model_copy(update={"eval": "o/set", "split": "test", "columns": {"question": "q"}})
    opened = replace(opened, config=opened.config.model_copy(update={"data": data}))
    assert opened.reading("o/set") == ("test", {"question": "q"}) and opened.reading("mine.jsonl") == ("train", {})


def test_what_is_no_run_is_refused(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no run"):
        trained_model.open_run(str(tmp_path))
    (tmp_path / "config.yaml").write_text((finished_run / "config.yaml").read_text())
    with pytest.raises(ModelError, match=r"not finished and has no adapter/; resume it: fasttune train .*--resume"):
        trained_model.open_run(str(tmp_path))
    os.symlink(finished_run / "adapter", tmp_path / "adapter")
    (tmp_path / "run.json").write_text('{"status": "interrupted"}')
    assert "is interrupted" in trained_model.open_run(str(tmp_path)).warnings[0]
    assert trained_model.open_run(str(finished_run)).warnings == []
