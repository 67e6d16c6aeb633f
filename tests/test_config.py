"""A run is declared once: what is accepted, and what a person is told when it is not."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fasttune import config, hints, settings
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
    assert "must divide" in problems({**SMALL, "train": {"batch_rows": 8, "micro_batch_rows": 3}})[0]
    assert "samples needs held-out rows" in problems({**SMALL, "samples": 2})[0]
    assert "eval.problems needs held-out rows" in problems({**SMALL, "eval": {"problems": 2}})[0]
    nf4 = {"name": "builtin:tiny", "quantization": "nf4"}
    assert "nf4" in problems({**SMALL, "model": nf4, "train": {"method": "full"}})[0]
    assert "pissa" in problems({**SMALL, "model": nf4, "lora": {"init": "pissa"}})[0]


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


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_dump_is_read_back_to_the_same_run(path: Path, tmp_path: Path) -> None:
    loaded = config.load(path)
    copy = tmp_path / "c.yaml"
    copy.write_text(config.dump(loaded))
    assert config.load(copy) == loaded


def test_the_page_of_settings_is_that_of_the_code() -> None:
    done = subprocess.run([sys.executable, "scripts/settings.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs" / "settings.md").read_text(), "python scripts/settings.py --write"
    rows = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    assert {line.split("`")[1] for line in rows} == set(config.known_keys())
    assert all(line.rstrip(" |").count("|") >= 3 for line in rows), "each has a meaning"


def read(tmp_path: Path, text: str, *overrides: str) -> config.Config:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return config.load(path, list(overrides))


TINY = "model: {name: builtin:tiny}\ndata: {train: builtin:arithmetic}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {max_steps: 1}\ntrain: {epochs: 2}", "line 4: train is given twice (first on line 3)"),
        ("train:\n  epochs: 1\n  epochs: 2", "line 5: epochs is given twice (first on line 4)"),
        ("seed: !!bool maybe", "line 3: the tag !!bool is not read"),
        ("name: &a [*a]", "line 3: the alias *a is not read: write the value out"),
        ("a: &a [x, x]\nb: [*a, *a]", "line 4: the alias *a is not read"),
        ("lora: {<<: {rank: 4}}", "lora.<<: unknown setting"),
        ("seed: " + "[" * 30 + "]" * 30, "nested more than 20 deep"),
        ("seed: " + "[" * 3000, "nested more than 20 deep"),
        ("# " + "x" * 100_000, "is over 100,000 bytes"),
        ('name: "\\0"', "line 3: a value holds the character U+0000"),
        ('name: "\\ud800"', "line 3: a value holds the character U+D800"),
        ("name: \x07", "line 3: not valid YAML (the character U+0007)"),
        ("[a]: b", "line 3: a key is text"),
    ],
)
def test_a_file_that_means_something_else_is_refused_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        read(tmp_path, TINY + text)


def test_values_are_read_as_they_are_written(tmp_path: Path) -> None:
    """Of YAML 1.1's types only true, false and null are left; a setting that wants a number reads it."""
    loaded = read(
        tmp_path, f"{TINY}name: 010\noverwrite: yes\noutput_dir: 2024-01-01\nsamples: 0", "model.revision=1:30"
    )
    assert (loaded.name, loaded.overwrite, loaded.output_dir, loaded.model.revision) == (
        "010",
        True,
        "2024-01-01",
        "1:30",
    )
    for key in ("train.max_steps", "train.learning_rate", "checkpoint.max_hours", "data.train.x"):
        for value in ("yes", "on", "true", "010", "1:30", "0x10", "0x_", "2024-13-45", "9" * 5000):
            section, leaf = key.split(".", 1)
            text = {"model": "{name: builtin:tiny}", "data": "{train: x}"} | {section: f"{{{leaf}: {value}}}"}
            text |= {"data": f"{{train: {{x: {value}}}}}"} if section == "data" else {}
            with pytest.raises(ConfigError, match=rf"c\.yaml: {re.escape(key)}: ") as caught:
                read(tmp_path, "\n".join(f"{name}: {body}" for name, body in text.items()))
            assert len(caught.value.problems) == 1 and len(caught.value.problems[0]) < 300


def test_numbers_have_bounds_with_a_reason() -> None:
    for section, key, values in (
        ("train", "learning_rate", (0, 1e-30, 2, 1e30)),
        ("train", "batch_rows", (0, 2**21)),
        ("train", "epochs", (0, 1e9)),
        ("lora", "rank", (0, 10**6)),
        ("eval", "rows", (0, 10**9)),
        ("data", "train", ({"x": 0}, {"x": 1e9})),
    ):
        for value in values:
            (line,) = problems({**SMALL, section: {**SMALL.get(section, {}), key: value}})
            assert line.startswith(f"{section}.{key}") and f"({hints.BOUNDS[f'{section}.{key}']})" in line
    assert "makes its rows" in problems({**SMALL, "data": {**SMALL["data"], "max_rows": 10**8}})[0]


@pytest.mark.parametrize("section", ["checkpoint", "eval"])
def test_how_often_has_a_unit(section: str) -> None:
    for every in (
        50,
        "50",
        "0 minutes",
        "0.0 minutes",
        "0 steps",
        "9" * 5000 + " steps",
        "5 hours",
        "0 %",
        "101 %",
        True,
    ):
        (line,) = problems({**SMALL, section: {"every": every}})
        assert line.startswith(f"{section}.every: write '50 steps'") and len(line) < 300
    data = {**SMALL["data"], "eval_share": 0.1}
    assert getattr(config.parse({**SMALL, "data": data, section: {"every": "10 %"}}), section).share == 0.1


def test_a_section_that_another_setting_makes_idle_is_left_out_by_null(tmp_path: Path) -> None:
    text = f"{TINY}lora: {{rank: 4}}\neval: {{problems: 3}}\n"
    with pytest.raises(ConfigError, match=r"lora=null"):
        read(tmp_path, text, "train.method=full")
    with pytest.raises(ConfigError, match=r"eval=null"):
        read(tmp_path, text)
    assert read(tmp_path, text, "train.method=full", "lora=null", "eval=null").train.method == "full"
    assert read(tmp_path, text, "lora=null", "lora.alpha=3", "eval=null").lora == settings.LoraConfig(alpha=3)
    with pytest.raises(ConfigError, match=r"^model.name: is required"):
        read(tmp_path, text, "model=null", "eval=null")


def test_names_that_no_disk_can_have_are_refused(tmp_path: Path) -> None:
    for key in ("model.name", "data.train", "data.eval", "output_dir"):
        for value, told in (
            ("~nosuchuser/x", "no user"),
            ("x" * 300, "too long"),
            ("a\0", "U+0000"),
            ("\udcff", "U+DCFF"),
        ):
            with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: .*{re.escape(told)}") as caught:
                read(tmp_path, TINY, f"{key}={value}")
            assert len(caught.value.problems) == 1
    with pytest.raises(ConfigError, match="^name: "):
        read(tmp_path, TINY, "name=" + "x" * 300)


def test_an_override_does_not_replace_a_section_or_lose_what_stands_behind_a_sign(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.train.x: train is 'builtin:arithmetic' already"):
        read(tmp_path, TINY, "data.train.x=1")
    assert read(tmp_path, TINY, "output_dir=a #b: c").output_dir == "a #b: c"
    with pytest.raises(ConfigError, match=r"data.train: x is given twice"):
        read(tmp_path, TINY, "data.train={x: 1, x: 2}")


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ("save_steps", "did you mean checkpoint.every,"),
        ("lora-r", "did you mean lora.rank?"),
        ("logging_steps", "not supported: every step is in metrics.jsonl"),
        ("lr_decay_style", "docs/settings.md"),  # in nobody's table, and near to nothing
    ],
)
def test_names_of_other_tools(theirs: str, told: str) -> None:
    assert told in problems({**SMALL, theirs: 1})[0]
    assert told in problems({**SMALL, "train": {theirs: 1}})[0]


def test_every_hint_names_a_setting_that_is_there_and_no_name_of_ours() -> None:
    known = config.known_keys()
    assert {ours.partition(",")[0] for ours in hints.NAMES} <= set(known)
    theirs = " ".join([*hints.NAMES.values(), *hints.NOT_SUPPORTED.values()]).split()
    assert len(theirs) == len(set(theirs)) and not {key.rpartition(".")[2] for key in known} & set(theirs)
