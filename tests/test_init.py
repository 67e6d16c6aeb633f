"""`fasttune init` and `fasttune schema`: a ready config with everything explained, and what editors check it with."""

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from fasttune import cli, config
from fasttune.errors import ConfigError, FasttuneError, OutputError
from fasttune.tools import init, ready, schema

ROOT = Path(__file__).resolve().parents[1]
RECIPES = [path.stem for path in sorted(Path("configs").glob("*.yaml"))]
SMALL: dict[str, Any] = {"model": {"name": "builtin:tiny"}, "data": {"train": "builtin:arithmetic"}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_the_same_config_and_says_how_to_run_it(name: str, here: Path) -> None:
    written = init.write(name, "my config.yaml")
    assert {path.name for path in here.iterdir()} == {"my config.yaml", ready.SCHEMA}
    loaded, recipe = config.load("my config.yaml"), config.load(ROOT / "configs" / f"{name}.yaml")
    assert loaded == recipe
    for section in config.SECTIONS:
        assert getattr(loaded, section).model_fields_set == getattr(recipe, section).model_fields_set
    first, second, *_ = Path("my config.yaml").read_text().splitlines()
    assert first == f"# {written['command']}" and second == schema.LINE
    words = shlex.split(written["command"])
    start = words.index("fasttune")
    options = cli.parser().parse_known_args(words[start + 1 :])[0]
    assert (options.command, options.config) == ("train", "my config.yaml")


@pytest.mark.parametrize("name", ["quickstart", "llama3.1_8b_cpt_patok"])
def test_every_setting_is_there_with_its_meaning_and_a_default_that_is_true(name: str, here: Path) -> None:
    """Taking the # away, one setting at a time, changes nothing, or is refused beside what the recipe has."""
    init.write(name, "c.yaml")
    lines, same = Path("c.yaml").read_text().splitlines(), config.load("c.yaml")
    found, section, made = [], "", schema.schema()
    for number, line in enumerate(lines):
        if match := re.fullmatch(r"(\w+):", line):
            section = f"{match[1]}."
        if not (match := re.match(r"( *)(# )?(\w+): .*", line)) or line.startswith("# data.train:"):
            continue
        key = section * bool(match[1]) + match[3]
        found.append(key)
        entry = ready.setting(made, key)
        behind = " ".join(
            text.partition("#")[2].strip() for text in [line.replace("# ", "", bool(match[2])), *below(lines, number)]
        )
        assert entry["description"] in behind, key
        if match[2]:
            Path("one.yaml").write_text("\n".join([*lines[:number], line.replace("# ", "", 1), *lines[number + 1 :]]))
            try:
                assert config.load("one.yaml") == same, key
            except ConfigError as error:
                assert "would be ignored" in str(error), key
    assert found == [key for key in config.known_keys() if key != config.TRUST]


def below(lines: list[str], number: int) -> list[str]:
    """The lines that continue the comment of a setting."""
    return list(itertools.takewhile(lambda line: line.startswith(" " * init.COMMENT_AT + " #"), lines[number + 1 :]))


def test_nothing_of_others_is_overwritten(here: Path) -> None:
    Path("config.yaml").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        init.write("quickstart", "config.yaml")
    (here / "other").mkdir()
    Path("other", ready.SCHEMA).write_text("{}")
    with pytest.raises(OutputError, match="another program's"):
        init.write("quickstart", "other/config.yaml")
    assert sorted(path.name for path in here.rglob("*")) == ["config.yaml", ready.SCHEMA, "other"]
    assert Path("config.yaml").read_text() == "mine" and Path("other", ready.SCHEMA).read_text() == "{}"
    old = schema.as_text(schema.schema()).replace('"seed"', '"of an older version"')
    Path(ready.SCHEMA).write_text(old)
    init.write("quickstart", "a\nb.yaml")
    assert json.loads(Path(ready.SCHEMA).read_text()) == schema.schema()
    assert config.load("a\nb.yaml").name == "quickstart"
    for name in ("quikstart", "configs/quickstart.yaml"):
        with pytest.raises(FasttuneError, match=r"did you mean quickstart\?"):
            init.write(name, "c.yaml")


def test_without_a_name_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init"]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["init", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == RECIPES
    for entry in listed:
        assert entry["name"] in shown and len(entry["about"].split()) > 3 and entry["about"][-1] != ":"


# --- the schema


def test_the_schema_beside_the_configs_is_that_of_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    told = capsys.readouterr().out
    assert told == (ROOT / "configs" / ready.SCHEMA).read_text(), "python scripts/settings.py --write"
    made = json.loads(told)
    assert ready.keys(made) == config.known_keys()
    for key in ready.keys(made):
        entry = ready.setting(made, key)
        assert entry["description"] and (key in ("model.name", "data.train") or "default" in entry), key
        if "default" in entry:
            assert problems(made, entry, entry["default"]) == [], key


@pytest.mark.parametrize("name", RECIPES)
def test_ready_and_written_configs_fit_the_schema_that_they_name(name: str, here: Path) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    init.write(name, "c.yaml")
    made = schema.schema()
    for file in (path, Path("c.yaml")):
        (named,) = re.findall(r"^# yaml-language-server: \$schema=(.*)$", file.read_text(), re.MULTILINE)
        assert (file.parent / named).is_file()
        assert problems(made, made, yaml.load(file.read_text(), Core)) == []


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [
        ("train.learning_rate", 1e-4, True),
        ("train.learning_rate", 3, False),
        ("train.scheduler", "cosin", False),
        ("train.packing", True, True),
        ("train.packing", "perhaps", False),
        ("train.betas", [0.9], False),
        ("train.nmae", 1, False),
        ("seed", 1.5, False),
        ("name", "a b", False),
        ("lora", None, True),
        ("model", None, False),
        ("model.trust_remote_code", False, True),
        ("model.trust_remote_code", True, False),
        ("data.train", {"a.jsonl": 1, "b.jsonl": 0.5}, True),
        ("data.train", {"a.jsonl": 0}, False),
        ("data.train", {"a.jsonl": "much"}, False),
        ("data.train", ["a.jsonl"], False),
        ("data.allow_lost", ["tools"], True),
        ("data.allow_lost", ["tool"], False),
        ("checkpoint.every", "50 steps", True),
        ("checkpoint.every", "2.5 minutes", True),
        ("checkpoint.every", "0 minutes", False),
        ("checkpoint.every", "start and end", False),
        ("eval.every", "start and end", True),
        ("eval.every", "10 %", True),
        ("eval.every", "10 minutes", False),
        ("eval.every", 50, False),
    ],
)
def test_it_takes_what_a_run_takes(key: str, value: Any, fits: bool, here: Path) -> None:
    """Of one setting alone: the schema and `config.load` agree."""
    tree = json.loads(json.dumps(SMALL | {"data": SMALL["data"] | {"eval_share": 0.1}}))
    *sections, leaf = key.split(".")
    inner = tree
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[leaf] = value
    made = schema.schema()
    assert (problems(made, made, tree) == []) is fits
    Path("c.yaml").write_text(yaml.safe_dump(tree))
    try:
        config.load("c.yaml")
        loads = True
    except ConfigError:
        loads = False
    assert loads is fits


class Core(yaml.SafeLoader):
    """Numbers as YAML 1.2 has them, which editors read: 1e-4 is one."""


Core.yaml_implicit_resolvers = yaml.SafeLoader.yaml_implicit_resolvers.copy()
Core.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)
TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "number": (int, float), "integer": int}
TYPES |= {"boolean": bool, "null": type(None)}
SAID_ONLY = {"title", "description", "default", "examples", "$schema", "definitions"}


def problems(root: dict[str, Any], part: dict[str, Any], value: Any, place: str = "") -> list[str]:
    """What is wrong with a value by what ours uses of JSON schema, draft 7; another word of it is an error."""
    found = []
    for word, rule in part.items():
        match word:
            case "$ref":
                found += problems(root, root["definitions"][rule.removeprefix("#/definitions/")], value, place)
            case "anyOf":
                fits = all(problems(root, branch, value, place) for branch in rule)
                found += [f"{place}: {value!r} fits no branch"] if fits else []
            case "type":
                kinds = rule if isinstance(rule, list) else [rule]
                of = "boolean" if isinstance(value, bool) else None
                right = of in kinds if of else any(isinstance(value, TYPES[kind]) for kind in kinds)
                found += [] if right else [f"{place}: {value!r} is no {rule}"]
            case "properties" if isinstance(value, dict):
                for name in value.keys() & rule:
                    found += problems(root, rule[name], value[name], f"{place}.{name}")
            case "additionalProperties" if isinstance(value, dict):
                for name in value.keys() - part.get("properties", {}).keys():
                    more = [f"{place}.{name}: unknown"] if rule is False else problems(root, rule, value[name], name)
                    found += more
            case "required" if isinstance(value, dict):
                found += [f"{place}.{name}: missing" for name in rule if name not in value]
            case "items" if isinstance(value, list):
                found += [told for item in value for told in problems(root, rule, item, place)]
            case "enum":
                found += [] if value in rule else [f"{place}: {value!r} is none of {rule}"]
            case "const":
                found += [] if value == rule and type(value) is type(rule) else [f"{place}: {value!r} is not {rule!r}"]
            case "pattern" if isinstance(value, str):
                found += [] if re.search(rule, value) else [f"{place}: {value!r} is not like {rule}"]
            case _ if word in LIMITS:
                of, right = LIMITS[word]
                found += [] if not isinstance(value, of) or right(value, rule) else [f"{place}: {word} {rule}"]
            case _:
                known = {"properties", "additionalProperties", "required", "items", "pattern"}
                assert word in SAID_ONLY | known, word
    return found


LIMITS: dict[str, Any] = {
    "minimum": ((int, float), lambda value, least: value >= least),
    "maximum": ((int, float), lambda value, most: value <= most),
    "exclusiveMinimum": ((int, float), lambda value, least: value > least),
    "exclusiveMaximum": ((int, float), lambda value, most: value < most),
    "minItems": (list, lambda value, least: len(value) >= least),
    "maxItems": (list, lambda value, most: len(value) <= most),
    "minLength": (str, lambda value, least: len(value) >= least),
    "maxLength": (str, lambda value, most: len(value) <= most),
}
