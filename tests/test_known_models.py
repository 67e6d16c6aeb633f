"""A plan without the hub: what it knows of well-known models, whether that is right, and what it says of it."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fasttune import cli, hub
from fasttune.core.memory import Shape
from fasttune.data import chat_templates
from fasttune.errors import ModelError
from fasttune.metrics import Forecast, Memory, Range
from fasttune.settings import ModelConfig
from fasttune.tools import known_models

CONFIG = "configs/llama3.1_8b_gsm8k.yaml"
NAMES = sorted(known_models.all_of_them())


def test_a_dozen_families_are_known() -> None:
    assert len(NAMES) >= 30 and {name.split("/")[0] for name in NAMES} == {
        "HuggingFaceTB", "Qwen", "allenai", "google", "meta-llama", "microsoft", "mistralai",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_sizes_make_the_published_number_of_parameters(name: str) -> None:
    """Shape leaves out biases, norms within a layer and routers: below 0.05 % in all of them."""
    known = known_models.all_of_them()[name]
    counted = Shape.of(SimpleNamespace(**known.config)).parameters
    assert counted <= known.parameters and math.isclose(counted, known.parameters, rel_tol=5e-4)
    assert known.chat_template in (None, *chat_templates.NAMES)
    assert 0.5 < known.tokens[0] <= known.tokens[1] < 2


@pytest.fixture(scope="module")
def the_hub() -> str:
    """Its address where it answers; this session's tests are offline, and stay so."""
    import httpx

    endpoint = os.environ.get("HF_ENDPOINT") or hub.ENDPOINT
    try:
        httpx.head(endpoint, timeout=hub.TIMEOUT_S)
    except (httpx.HTTPError, OSError) as error:
        pytest.skip(f"{endpoint} cannot be reached ({error})")
    return endpoint


@pytest.mark.parametrize("name", NAMES)
def test_they_are_what_the_hub_says(the_hub: str, name: str) -> None:
    import httpx

    token = os.environ.get("HF_TOKEN")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    answer = httpx.get(f"{the_hub}/{name}/resolve/main/config.json", headers=headers, follow_redirects=True, timeout=30)
    if answer.status_code != 200:
        pytest.skip(f"{name}: the hub answers {answer.status_code}; with HF_TOKEN of who may read it, it is compared")
    import transformers

    said = answer.json()
    config = transformers.AutoConfig.for_model(said.pop("model_type"), **said).get_text_config()
    known = known_models.all_of_them()[name].config
    assert Shape.of(config) == Shape.of(SimpleNamespace(**known))
    assert config.max_position_embeddings == known["max_position_embeddings"]


@pytest.fixture
def counts_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """builtin:tiny stands in for SmolLM2, which takes half a minute to be made."""
    monkeypatch.setattr(known_models, "COUNTS", "builtin:tiny")


def planned(capsys: Any, *arguments: str) -> tuple[int, Any, str]:
    code = cli.main(["plan", *arguments, "--gpu", "h100-80", "--usd-per-hour", "2", "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out.splitlines()[-1]) if said.out.strip() else None, said.err


def test_a_bill_without_an_account(
    tmp_path: Path, cache: Path, counts_bytes: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"What is {n}?", "answer": str(n)}) + "\n" for n in range(64)))
    monkeypatch.setenv("COLUMNS", "200")
    code, plan, said = planned(capsys, CONFIG, f"data.train={rows}")
    assert code == 0, said
    settings = {each["name"]: (each["value"], each["reason"]) for each in plan["settings"]}
    assert settings["model"][0] == "meta-llama/Llama-3.1-8B, 8,030 M parameters"
    assert (
        settings["shape"][0] == "from fasttune's own list" and "not the hub's: HF_HUB_OFFLINE" in settings["shape"][1]
    )
    assert settings["tokens"][0] == "counted by builtin:tiny's tokenizer, × 0.89"
    assert "0.85 to 0.94 for one of these in English text: an estimate" in settings["tokens"][1]
    plain = "### User:\nWhat is 7?\n\n### Assistant:\n7"  # a base model has no template; EOS is one token
    whole = sum(len(plain) - 2 + 2 * len(str(n)) + 1 for n in range(64))
    assert plan["forecast"]["tokens"] == round(5 * whole * math.sqrt(0.852 * 0.935))
    assert plan["forecast"]["usd"]["expected"] == pytest.approx(2 * plan["forecast"]["hours"]["expected"])


def test_a_set_of_the_hub_is_one_line_that_says_to_give_a_file(counts_bytes: None, cache: Path, capsys: Any) -> None:
    code, _, said = planned(capsys, CONFIG)
    assert code == 2 and said.splitlines()[-1].startswith("fasttune: data: openai/gsm8k:main is no file")
    assert said.splitlines()[-1].endswith("give the file") and len(said.splitlines()) == 2, said


@pytest.mark.parametrize("model", [{"name": "nobody/nothing"}, {"name": NAMES[0], "revision": "v2"}])
def test_what_is_not_known_is_refused_as_before(unsloth: None, model: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="neither a local folder nor in the hub's cache"):
        known_models.read(ModelConfig(**model))


def test_a_model_that_is_there_is_read_from_there(unsloth: None) -> None:
    architecture, tokenizer, assumed = known_models.read(ModelConfig(name="builtin:tiny"))
    assert architecture.hidden_size == 64 and tokenizer.chat_template and assumed == known_models.Assumed()


def test_control_tokens_of_the_real_template_count_once(unsloth: None, counts_bytes: None) -> None:
    _, tokenizer, assumed = known_models.read(ModelConfig(name="meta-llama/Llama-3.1-8B-Instruct"))
    assert tokenizer.chat_template == chat_templates.read("llama3")
    assert len(tokenizer("<|start_header_id|>user<|end_header_id|>", add_special_tokens=False).input_ids) == 6
    assert assumed.tokens == Range(0.852, pytest.approx(0.8925, abs=1e-4), 0.935)


def test_added_tokens_are_one_token_and_a_row_each(unsloth: None, counts_bytes: None) -> None:
    architecture, tokenizer, _ = known_models.read(ModelConfig(name=NAMES[0], added_tokens=["zqx", "xqz"]))
    assert architecture.vocab_size == known_models.all_of_them()[NAMES[0]].config["vocab_size"] + 2
    assert len(tokenizer("zqx", add_special_tokens=False).input_ids) == 1


def test_a_forecast_is_scaled_in_tokens_hours_and_dollars() -> None:
    memory, one = Memory(1, 0, 0, 0, 0, 0, 0, 0), Range(1.0, 2.0, 3.0)
    expected = Forecast(memory, one, 100, 10, 1000, one, one, None, "measured")
    assert known_models.scaled(expected, None) is expected
    more = known_models.scaled(expected, Range(0.5, 1.0, 2.0))
    assert (more.tokens, more.hours, more.usd) == (1000, Range(0.5, 2.0, 6.0), None)
    assert (more.steps, more.tokens_per_s, more.peak_memory_gib) == (10, one, one)
