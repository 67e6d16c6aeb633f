"""Model cards: what was measured and nothing else, fit to be shared, and text that nobody else can make into markup."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fasttune.tools import card, merge_check, trained_model

pytestmark = pytest.mark.usefixtures("unsloth")


def test_the_card_says_what_was_measured(finished_run: Path) -> None:
    compared = merge_check.Comparison("float32", "float32", 9, 1e-6, 1e-3, 0.1, 1.0, [], True)
    for merged in (compared, None):
        text = card.text(card.of(trained_model.open_run(str(finished_run))), merged)
        _, head, body = text.split("---\n", 2)
        metadata = yaml.safe_load(head)
        assert metadata["library_name"] == ("transformers" if merged else "peft")
        assert "base_model" not in metadata and "datasets" not in metadata  # builtin: is not on the hub
        result = json.loads((finished_run / "run.json").read_text())
        for told in (
            "builtin:arithmetic: 32 rows",
            "rslora: true",
            f"torch {result['versions']['torch']}",
            result["hardware"]["cpu_model"],
            "tokens/s",
            "Not evaluated",
        ):
            assert told in body, told
        assert ("## Merge" in body) == (merged is not None)
        assert str(finished_run.parent) not in text and "/models/" not in text
    assert text == (finished_run / "adapter" / "README.md").read_text()


def test_scores_and_hub_ids_are_on_the_card_and_paths_are_not(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    rows = f"{tmp_path}/secret folder/rows.jsonl"
    config["data"]["eval"] = f"{tmp_path}/secret folder/held_out.jsonl"
    config["model"]["name"], config["data"]["train"] = "owner/name", {rows: 1.0, "some/set:main": 2.0}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    result = json.loads((tmp_path / "run" / "run.json").read_text())
    for setting in result["settings"]:
        setting["value"] = setting["value"].replace("builtin:arithmetic", rows)
    local = f"{tmp_path}/secret folder/the-model"
    result["settings"] += [{"name": "model", "value": local, "reason": f"weights of {local}"}]
    result["warnings"] = [f"{config['data']['eval']}: 3 rows cut", f"asked for (data={tmp_path}/secret/x.jsonl)"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(result))
    score = {"task": "gsm|8k", "metric": "exact", "value": 0.25, "stderr": None, "problems": 4}
    (tmp_path / "run" / "eval.json").write_text(json.dumps({"scores": [score]}))
    text = card.text(card.of(trained_model.open_run(str(tmp_path / "run"))), None)
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert (metadata["base_model"], metadata["datasets"]) == ("owner/name", ["some/set"])
    assert "| gsm\\|8k | exact | 0.2500 | – | – | – | 4 |" in text
    assert "- rows.jsonl: 32 rows" in text and "Warning: held_out.jsonl: 3 rows cut" in text
    config["model"]["name"] = local
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    text = card.text(card.of(trained_model.open_run(str(tmp_path / "run"))), None)
    assert "| model | the-model | weights of the-model |" in text and "(data=x.jsonl)" in text
    assert "secret" not in text and str(tmp_path) not in text


@pytest.mark.filterwarnings("ignore:The following generation flags are not valid")
def test_the_snippet_of_the_card_answers(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As it stands, in the folder of the card; with a chat template, and without one."""
    folder = tmp_path / "adapter"
    shutil.copytree(finished_run / "adapter", folder)
    monkeypatch.chdir(folder)
    for plain in (False, True):
        if plain:
            (folder / "chat_template.jinja").unlink()
            card.write(folder, card.of(trained_model.open_run(str(finished_run))))
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        assert ("apply_chat_template" in code) != plain
        capsys.readouterr()
        exec(compile(code, "README.md", "exec"), {})
        assert len(capsys.readouterr().out) > 1


def test_the_card_counts_what_was_trained_on_and_says_what_comes_next(finished_run: Path) -> None:
    text = (finished_run / "adapter" / "README.md").read_text()
    result = json.loads((finished_run / "run.json").read_text())
    assert f"Trained on {result['tokens']:,} tokens in 2 steps, {result['loss_tokens']:,} of them supervised" in text
    commands = [line.partition("  # ")[0] for line in text.split("```bash\n")[1].split("```")[0].splitlines()]
    assert commands == [
        "fasttune generate . --chat",
        "fasttune eval .",
        "fasttune merge . --out ../merged",
        "vllm serve BASE_MODEL --enable-lora --lora-modules tiny=. --max-lora-rank 8",
    ]


HOSTILE = "<img src=x>![](http://x/y.png) | [a](javascript:b) `c`\n# *d*"


def test_what_names_warnings_and_scores_say_is_text_on_a_card(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["name"] = "```\n" + HOSTILE.replace("/", "")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    result = json.loads((run / "run.json").read_text())
    result |= {"warnings": [HOSTILE], "versions": {HOSTILE: HOSTILE}}
    result["settings"] = [{"name": name, "value": HOSTILE, "reason": HOSTILE} for name in ("data", "model")]
    result["backend"]["library"] = result["hardware"]["cpu_model"] = HOSTILE
    (run / "run.json").write_text(json.dumps(result))
    score = {"task": HOSTILE, "metric": HOSTILE, "value": None, "stderr": 0.5, "problems": 4}
    (run / "eval.json").write_text(json.dumps({"scores": [score]}))
    text = card.text(card.of(trained_model.open_run(str(run))), None)
    recipe = text.split("````yaml\n")[1].split("````")[0]
    assert yaml.safe_load(recipe)["model"]["name"] == config["model"]["name"]
    rest = text.replace(recipe, "")
    assert "<img" not in rest and "](" not in rest.replace("\\](", "") and "\n# *d" not in rest
    assert r"&lt;img src=x&gt;!\[\](" in rest and r" \| \[a\](javascript:b) \`c\` # \*d\*" in rest
    assert rest.count("| – | ± 0.5000 (standard error) | – | – | 4 |") == 1


def test_a_damaged_eval_json_is_said_on_the_card(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    for text in ("[]", "{", '{"scores": 7}', '{"scores": [{"task": "x"}]}', "[" * 99999):
        (run / "eval.json").write_text(text)
        assert "Not known: eval.json cannot be read." in card.text(card.of(trained_model.open_run(str(run))), None)


def test_figures_that_cannot_be_shown_are_left_out(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    result = json.loads((run / "run.json").read_text())
    for wrong in ({"wall_s": float("inf")}, {"backend": 7}):
        (run / "run.json").write_text(json.dumps(result | wrong))
        assert "Nothing was measured." in card.text(card.of(trained_model.open_run(str(run))), None)
