"""The door to EleutherAI's evaluation harness: our model behind its interface, tasks by name, answers kept.

Source: https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/interface.md
"""

import difflib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from typing import Any

from fasttune import hub, system
from fasttune.core import model as fasttune_model, decoding  # noqa: F401  model first: it imports unsloth
from fasttune.tools import tasks
from fasttune.tools.tasks import benchmarks

import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fasttune.data import chat
from fasttune.data.formats import Unusable
from fasttune.errors import DataError, FasttuneError, in_one_line

FEWSHOT_SEED = 1234  # the harness's own


class Harness(HFLM):
    """A loaded model as the harness asks it; a request that this model has answered before is not asked again."""

    def __init__(
        self, model: Any, tokenizer: Any, batch_rows: int, known: "AnswerCache", progress: Callable[[str, float], None]
    ):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_rows)
        self.known, self.progress = known, progress
        self.stops = decoding.stop_ids(model, tokenizer)
        self.from_cache = self.computed = 0  # requests

    @cached_property
    def template(self) -> chat.Template:
        """Not read where prompts are put as they are: such a model may have none."""
        return chat.template_of(self.tokenizer)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        if any(request.args[1].get("do_sample") for request in requests):  # each draw is to be its own
            self.computed += len(requests)
            return super().generate_until(requests, disable_tqdm=True)
        return self._answer("generate_until", requests, super().generate_until)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [tuple(found) for found in self._answer("loglikelihood", requests, super().loglikelihood)]

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
        """What the task leaves open is as in training's samples, not as the model's own generation_config has it."""
        settings = {**decoding.NEUTRAL, "eos_token_id": self.stops, **settings}
        return super()._model_generate(context, max_length, stop, **settings)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As in training, so that a template is bounded here too; one that takes no system turn is asked without it."""
        if not add_generation_prompt:  # a task that begins the answer itself
            return super().apply_chat_template(chat_history, add_generation_prompt)
        try:
            return self.template.prompt(chat_history)
        except Unusable:
            return self.template.prompt([turn for turn in chat_history if turn["role"] != "system"])

    def _answer(self, kind: str, requests: list[Any], ask: Callable[..., list[Any]]) -> list[Any]:
        asked = [json.dumps([kind, *request.args], sort_keys=True) for request in requests]  # prompt, and how to answer
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in asked]
        found = self.known.read(keys)
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
        self.from_cache += len(found)
        self.computed += len(missing)
        for request in missing.values():
            for text in (argument for argument in request.args if isinstance(argument, str)):
                if why := decoding.refusal(self.model, self.tokenizer, text):
                    raise DataError(f"problem {request.doc_id + 1} of {request.task_name}: {why}")
        # The longest first, so that what does not fit into memory fails at once; kept batch by batch.
        order = sorted(missing, key=lambda key: (-len(missing[key].args[0]), key))
        for at in range(0, len(order), self.batch_size):
            part = order[at : at + self.batch_size]
            self.progress("answering", at / len(order))
            # Copies: the harness adds the end-of-text token to the stop words of a request while it answers it.
            copies = [replace(missing[key], arguments=deepcopy(missing[key].args)) for key in part]
            new = dict(zip(part, ask(copies, disable_tqdm=True), strict=True))
            self.known.write(new)
            found |= new
        self.progress("answering", 1.0)
        return [found[key] for key in keys]


class AnswerCache:
    """What this model has answered, by request: SQLite and JSON, so that nothing in the file is ever executed.

    `keep`: beyond the end of the process. Raises sqlite3.Error.
    """

    def __init__(self, model: Any, tokenizer: Any, keep: bool):
        folder = system.cache_root() / "answers"
        with suppress(OSError):  # SQLite says that it cannot open a file there
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{fingerprint(model, tokenizer)}.sqlite" if keep else ":memory:"  # SQLite's name for it
        self.database = sqlite3.connect(path, timeout=60)
        with self.database:
            self.database.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT)")

    def read(self, keys: list[str]) -> dict[str, Any]:
        """The answers there are, by key."""
        query = "SELECT answer FROM answers WHERE request = ?"
        rows = {key: self.database.execute(query, (key,)).fetchone() for key in keys}
        return {key: json.loads(row[0]) for key, row in rows.items() if row}

    def write(self, new: dict[str, Any]) -> None:
        rows = [(key, json.dumps(answer)) for key, answer in new.items()]
        with self.database:
            self.database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def close(self) -> None:
        self.database.close()


def fingerprint(model: Any, tokenizer: Any) -> str:
    """Hash of what decides an answer: every weight, the scale of every adapter, tokenizer, stops, kind of device."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for name, module in model.named_modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict):
            digest.update(f"{name} {scaling}".encode())
    digest.update(str(decoding.stop_ids(model, tokenizer)).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()[:32]


def load_tasks(
    names: list[str], data: str | None, split: str = "train", columns: dict[str, str] | None = None
) -> dict[str, Any]:
    """Tasks of ours and of the harness by name; `split` and `columns` say how `data` is read.

    Raises FasttuneError for an unknown one or one without its data.
    """
    metadata = {"data": data, "split": split, "columns": columns or {}} if data else {}
    only_ours = set(names) <= {*tasks.NAMES, *benchmarks.NAMES}
    if not only_ours:
        hub.look()  # their data are there
    manager = TaskManager(include_path=tasks.FOLDER, include_defaults=not only_ours, metadata=metadata)
    asked = [benchmarks.config(name) if name in benchmarks.NAMES else name for name in names]
    for name in filter(lambda task: isinstance(task, str), asked):
        if not manager.match_tasks([name]):
            known = [*manager.all_tasks, *benchmarks.NAMES, *benchmarks.GROUPS]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"ours are {', '.join(tasks.NAMES)}"
            raise FasttuneError(f"--tasks {name}: the harness knows no such task ({hint})")
    with _tasks_in_one_line(names):
        loaded = dict(manager.load(asked))
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def run(harness: Harness, loaded: dict[str, Any], limit: int | None, templated: bool) -> dict[str, Any]:
    """The harness's own results, every problem of them included. `templated`: through the model's chat template."""
    how = {"apply_chat_template": templated, "fewshot_as_multiturn": templated, "log_samples": True}
    with _tasks_in_one_line(loaded["tasks"]):
        return dict(evaluator.evaluate(harness, loaded, limit=limit, **how))


def _tasks_in_one_line(names: Iterable[str]) -> AbstractContextManager[None]:
    fix = "install what it asks for, check its data and the network, or use a model with another chat template"
    kinds = (ImportError, OSError, ValueError, KeyError, Unusable)
    return in_one_line(DataError, f"--tasks {', '.join(names)}: cannot be run", fix, kinds)
