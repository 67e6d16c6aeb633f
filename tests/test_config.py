"""A run is declared once: what is accepted, and what a person is told when it is not."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fasttune import config
from fasttune.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(Path("configs").rglob("*.yaml"))
SMALL = {"model": {"name": "builtin:tiny"}, "data": {"train": "builtin:arithmetic"}}


def problems(tree: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse(tree)
    return caught.value.problems


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_config_parses_and_opens_with_its_command(path: Path) -> None:
    config.load(path)
    first = path.read_text().splitlines()[0]
    command = shlex.split(first.removeprefix("# "))
    assert str(path) in first or (path.stem == "quickstart" and command[:2] == ["bash", "scripts/demo.sh"])


def test_the_recipes_are_the_published_ones() -> None:
    gsm8k, meta = (config.load(f"configs/llama3.1_8b_{name}.yaml") for name in ("gsm8k", "metamathqa"))
    for recipe in (gsm8k, meta):
        lora = recipe.lora
        assert (lora.rank, lora.alpha, lora.dropout, lora.rslora, lora.init) == (32, 64, 0.05, True, "pissa")
        assert recipe.model.max_length == 1024 and recipe.model.quantization == "none"
        assert lora.targets == config.SEVEN_PROJECTIONS
    assert (gsm8k.train.learning_rate, gsm8k.train.warmup_ratio) == (3e-4, 0.1)
    assert (gsm8k.train.epochs, gsm8k.train.batch_rows) == (5, 64)
    assert (meta.train.learning_rate, meta.train.warmup_ratio) == (1e-4, 0.05)
    assert (meta.train.epochs, meta.train.batch_rows) == (2, 128)


def test_all_problems_come_at_once_each_with_its_key() -> None:
    found = problems({"model": {"nmae": "x"}, "data": {"train": "a"}, "train": {"epochs": -1}, "seed": "x"})
    assert len(found) == 4  # the misspelt key, the key it leaves missing, the range and the type
    assert {line.split(":")[0] for line in found} == {"model.nmae", "model.name", "train.epochs", "seed"}


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("model", "nmae", "model.name"),
        ("train", "learnin_rate", "train.learning_rate"),
        ("train", "lr", "train.learning_rate"),
        ("train", "rank", "lora.rank"),
        ("lora", "r", "lora.rank"),
    ],
)
def test_an_unknown_key_names_the_nearest(section: str, key: str, nearest: str) -> None:
    tree = {**SMALL, section: {**SMALL.get(section, {}), key: 1}}
    assert f"{section}.{key}: unknown setting (did you mean {nearest}?)" in problems(tree)


def test_settings_that_would_be_ignored_are_refused() -> None:
    assert "lora.* would be ignored" in problems({**SMALL, "lora": {"rank": 4}, "train": {"method": "full"}})[0]
    assert "samples needs held-out rows" in problems({**SMALL, "samples": 2})[0]
    assert "eval.problems needs held-out rows" in problems({**SMALL, "eval": {"problems": 2}})[0]
    nf4 = {"name": "builtin:tiny", "quantization": "nf4"}
    assert "nf4" in problems({**SMALL, "model": nf4, "train": {"method": "full"}})[0]
    assert "pissa" in problems({**SMALL, "model": nf4, "lora": {"init": "pissa"}})[0]


def test_the_micro_batch_divides_the_batch() -> None:
    assert "must divide" in problems({**SMALL, "train": {"batch_rows": 8, "micro_batch_rows": 3}})[0]


def test_overrides_win_and_are_typed(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {name: builtin:tiny}\ndata: {train: builtin:arithmetic}\n")
    loaded = config.load(path, ["train.max_steps=20", "train.learning_rate=3e-4", "data.columns={question: q}"])
    assert loaded.train.max_steps == 20
    assert loaded.train.learning_rate == 3e-4
    assert loaded.data.columns == {"question": "q"}
    texts = config.load(path, ["name=1e5", "model.revision=12e4567", "data.eval=nan", "output_dir="])
    assert (texts.name, texts.model.revision, texts.data.eval) == ("1e5", "12e4567", "nan")
    assert config.load(path, ["name=nan", "checkpoint.max_hours=5e-1"]).checkpoint.max_hours == 0.5
    assert texts.output_dir is None
    with pytest.raises(ConfigError, match="train.learning_rate"):
        config.load(path, ["train.learning_rate=nan"])
    with pytest.raises(ConfigError, match="train.max_steps"):
        config.load(path, ["train.max_steps=many"])
    with pytest.raises(ConfigError, match="not of the form key=value"):
        config.load(path, ["--epochs"])


@pytest.mark.parametrize("text", ["", "- a\n", "a: [1\n", "just words\n"])
def test_a_file_that_is_no_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="c.yaml"):
        config.load(path)


def test_a_python_object_in_yaml_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"name: !!python/object/apply:os.mkdir [{tmp_path}/made]\n")
    with pytest.raises(ConfigError):
        config.load(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_dump_is_read_back_to_the_same_run(path: Path, tmp_path: Path) -> None:
    loaded = config.load(path)
    copy = tmp_path / "c.yaml"
    copy.write_text(config.dump(loaded))
    assert config.load(copy) == loaded


def test_dump_of_full_fine_tuning_is_accepted_again(tmp_path: Path) -> None:
    copy = tmp_path / "c.yaml"
    copy.write_text(config.dump(config.parse({**SMALL, "train": {"method": "full"}})))
    assert config.load(copy).train.method == "full"


def test_the_page_of_settings_is_that_of_the_code() -> None:
    done = subprocess.run([sys.executable, "scripts/settings.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs" / "settings.md").read_text(), "python scripts/settings.py --write"
    rows = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    assert {line.split("`")[1] for line in rows} == set(config.known_keys())
    assert all(line.rstrip(" |").count("|") >= 3 for line in rows), "each has a meaning"
