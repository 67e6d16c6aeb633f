"""Every package of the stack imported alone, deep enough that lazy packages really load what fasttune uses."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from functools import partial

from fasttune import stack
from fasttune.verify import Result, judged

# module → something in it that a lazy package would otherwise leave unloaded; the slow ones first, as they are run.
# unsloth and unsloth_zoo: see parity.py.
MODULES = {
    "transformers": "LlamaForCausalLM",
    "peft": "LoraConfig",
    "trl": "SFTTrainer",
    "torchao": "quantization",
    "accelerate": "Accelerator",
    "torch": "nn",
    "datasets": "Dataset",
    "triton": "language",
    "numpy": "linalg",
    "tokenizers": "Tokenizer",
    "torchvision": "ops",
    "bitsandbytes": "functional",
    "flash_attn": "flash_attn_func",
}


def import_alone(module_name: str) -> Iterator[Result]:
    name, distribution, part = f"import:{module_name}", stack.canonical(module_name), MODULES[module_name]
    if importlib.util.find_spec(module_name) is None:
        stack_name = stack.active_stack()
        if distribution in stack.read_pins(stack_name):
            yield judged(name, False, "is not installed", reinstall=(distribution,))
        else:
            yield Result(name, "skip", f"not in stack {stack_name}")
        return
    module = importlib.import_module(module_name)
    if not hasattr(module, part):
        importlib.import_module(f"{module_name}.{part}")
    yield Result(name, "pass", str(getattr(module, "__version__", importlib.metadata.version(distribution))))


CHECKS = {f"import:{module_name}": partial(import_alone, module_name) for module_name in MODULES}
