"""`python -m fasttune.verify.probe REPORT train …`: the real fasttune command, watched from inside by training.py.

Writes REPORT (JSON): connections tried, and for every parameter whether it was trainable and whether it changed.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from fasttune.verify.guard import block_network


def watch(seen: dict[str, Any]) -> None:
    """Every transformers.Trainer made from now on records its model's parameters before and after training."""
    importlib.import_module("fasttune.core.model")  # unsloth first: it patches transformers
    import torch
    from transformers import TrainerCallback, trainer

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen["before"] = {name: value.detach().cpu().clone() for name, value in model.named_parameters()}
            seen["trainable"] = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            before, after = seen.pop("before"), dict(model.named_parameters())
            same = {name for name in before if name in after and torch.equal(before[name], after[name].cpu())}
            seen["changed"] = [name for name in before if name not in same]
            seen["parameters"] = len(after)

    trainer.DEFAULT_CALLBACKS.append(Watch)  # type: ignore[arg-type]


def main(argv: list[str]) -> int:
    report, *command = argv
    seen: dict[str, Any] = {"connections": []}
    block_network(seen["connections"])
    try:
        watch(seen)
        from fasttune import cli

        return cli.main(command) or 0
    finally:
        seen.pop("before", None)
        Path(report).write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
