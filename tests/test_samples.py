"""Held-out problems before and after: which are read, how they are scored, what is shown."""

import json
from pathlib import Path
from typing import Any

import pytest

from fasttune import config, terminal
from fasttune.errors import DataError

TREE: dict[str, Any] = {"model": {"name": "builtin:tiny", "max_length": 512}, "data": {"train": "builtin:arithmetic"}}


def test_all_are_scored_and_few_are_shown(unsloth: None) -> None:
    from fasttune.core import evaluation
    from fasttune.metrics import ExactMatch

    problems = [evaluation.Problem(f"q{n}", f"<q{n}>", f"so\n#### {n}") for n in range(4)]
    before, after = ["1", "#### 1", "#### 3", ""], ["#### 0", "#### 1", "#### 3", "#### 3"]
    settings = config.parse(TREE | {"samples": 1, "eval": {"problems": 4}, "data": {**TREE["data"], "eval_share": 0.5}})
    shown, match = evaluation.compare(settings, problems, before, after)
    assert [(sample.prompt, sample.before, sample.after) for sample in shown] == [("q0", "1", "#### 0")]
    assert match == ExactMatch(problems=4, before=0.25, after=0.75)
    assert (shown[0].before_right, shown[0].after_right) == (False, True)
    settings.samples, settings.eval.problems = 4, 2
    shown, match = evaluation.compare(settings, problems, before, after)
    assert len(shown) == 4 and match == ExactMatch(problems=2, before=0.5, after=1.0)
    settings.eval.problems = 0
    assert evaluation.compare(settings, problems, before, after)[1] is None


def test_one_right_and_one_wrong_are_shown(unsloth: None) -> None:
    from fasttune.core import evaluation
    from fasttune.metrics import Sample

    answers = [Sample(f"q{n}", "#### 1", "", "", False, right) for n, right in enumerate([False, False, True, True])]
    for count, wanted in {0: [], 1: [0], 2: [0, 2], 3: [0, 1, 2], 4: [0, 1, 2, 3], 9: [0, 1, 2, 3]}.items():
        assert evaluation.to_show(answers, count) == [answers[at] for at in wanted]
    assert evaluation.to_show(answers[:2], 2) == answers[:2]  # all are wrong
    alike = [Sample(f"q{n}", "r", "", "") for n in range(3)]  # not scored
    assert evaluation.to_show(alike, 2) == alike[:2]


def test_a_problem_that_cannot_be_scored_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from fasttune.core import evaluation

    file = tmp_path / "held_out.jsonl"
    rows = [{"question": "a", "answer": "#### 1"}, {"question": "b", "answer": "two"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = TREE | {"samples": 2, "eval": {"problems": 1}, "data": {**TREE["data"], "eval": str(file)}}
    batches: Any = None  # only needed for a share that is held out
    assert (
        len(evaluation.problems_of(config.parse(tree), tiny_tokenizer, batches, print)) == 2
    )  # the second is shown, not scored
    with pytest.raises(DataError, match=r"eval.problems: .*held_out\.jsonl.* line 2.*no `#### N`") as caught:
        evaluation.problems_of(config.parse(tree | {"eval": {"problems": 2}}), tiny_tokenizer, batches, print)
    assert "\n" not in str(caught.value)
    rows[1]["question"] = "b " * 600
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told: list[str] = []
    assert [p.question for p in evaluation.problems_of(config.parse(tree), tiny_tokenizer, batches, told.append)] == [
        "a"
    ]
    assert told == ["1 of the held-out problems are not asked: longer than model.max_length=512"]


TOOLS = (
    "{% for tool in tools or [] %}can {{ tool.function.name }}\n{% endfor %}"
    "{% for m in messages %}{% if 'forbidden' in m.content %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
)


def test_what_is_asked_is_what_training_has_before_the_answer(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """With its tools, up to the last answer that is learned; a row that the template refuses is left out of both."""
    from fasttune.core import evaluation
    from fasttune.data import chat, formats

    def said(role: str, content: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": content, **more}

    turns = [said("user", "1 + 1?"), said("assistant", "#### 2"), said("user", "Hm"), said("assistant", "", weight=0)]
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"messages": turns, "tools": tools}, {"messages": [said("user", "forbidden"), *turns[1:]]}]
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_tokenizer.chat_template = TOOLS
    asked = config.parse(TREE | {"samples": 2, "eval": {"problems": 2}, "data": {**TREE["data"], "eval": str(file)}})
    batches: Any = None
    [problem] = evaluation.problems_of(asked, tiny_tokenizer, batches, print)
    assert (problem.question, problem.reference) == ("1 + 1?", "#### 2")
    trained = formats.convert(rows[0], "messages", "row 1")
    text, [(start, end)] = chat.template_of(tiny_tokenizer).text(trained, "assistant", "row 1")
    assert (problem.prompt, text[start:end]) == (text[:start], "#### 2<|im_end|>")
    assert problem.prompt.startswith("can add")


def test_answers_in_parts_are_the_answers_at_once(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttune.core import evaluation, prepare

    tree = TREE | {"eval": {"problems": 5}, "data": {**TREE["data"], "max_rows": 8, "eval": "builtin:arithmetic"}}
    job = prepare.prepare(config.parse(tree), tmp_path / "run", terminal.Reporter(quiet=True))
    assert len(job.problems) == 5
    said = job.model.generation_config
    plain = evaluation.answer(job, job.problems)
    said.repetition_penalty = 9.0  # greedy means greedy
    assert evaluation.answer(job, job.problems) == plain
    said.repetition_penalty = 1.0
    job.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's
    whole = evaluation.answer(job, job.problems)
    assert whole == plain
    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 2)
    assert evaluation.answer(job, job.problems) == whole
    longest = max(len(job.tokenizer(problem.reference).input_ids) for problem in job.problems)
    assert max(len(job.tokenizer(text).input_ids) for text in whole) >= longest  # there is room for a right answer
    assert job.model.training and job.tokenizer.padding_side == "right"
