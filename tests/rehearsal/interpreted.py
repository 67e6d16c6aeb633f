"""Import this first: Unsloth's kernels for a GPU, on a CPU, with Triton in its interpreter.

For a process of its own only: Triton looks at TRITON_INTERPRET while it is imported.
"""

# ruff: noqa: E402
import os

os.environ |= {"UNSLOTH_ALLOW_CPU": "1", "TRITON_INTERPRET": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}

import sys

import torch

torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda *_: (9, 0)

import unsloth.kernels  # noqa: F401  before peft
from triton.runtime import interpreter

for module in [module for name, module in sys.modules.items() if name.startswith("unsloth.")]:
    if "triton_cast" in vars(module):  # tl.cast, which the interpreter does not take with a plain number
        module.triton_cast = lambda value, dtype: value.to(dtype) if hasattr(value, "to") else value

_patch = interpreter._patch_lang_tensor


def _patched(tensor: type, scope: object) -> None:
    """triton 3.6 asks for int(array), which numpy 2.4 refuses for an array of one number."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patched
