"""Unsloth's code for CUDA, run on a machine without a GPU: "cuda" means the CPU, Triton kernels run in its interpreter.

For a process of its own, before anything else imports torch, triton or unsloth:

    cuda_on_cpu.start()
    with cuda_on_cpu.Card():
        train.run(...)

What it cannot show is listed in docs/measuring.md. Only here, for a rehearsal, are names of libraries replaced.
"""

import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

os.environ |= {
    "UNSLOTH_ALLOW_CPU": "1",  # Unsloth's own switch: its CUDA modules on a machine without a driver
    "TRITON_INTERPRET": "1",
    "UNSLOTH_COMPILE_DISABLE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_RMSNORM_MULTIROW": "0",  # compared with the other kernel to the bit, which the interpreter fails
    "HF_HUB_OFFLINE": "1",
}
import torch
from torch.overrides import TorchFunctionMode

H100 = types.SimpleNamespace(  # as torch 2.11 answers on one
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=85_017_493_504,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    regs_per_multiprocessor=65536,
    L2_cache_size=52428800,
    is_integrated=0,
    gcnArchName="",
)


def start() -> None:
    """Import Unsloth as on an H100, and let fasttune see one."""
    _stand_in_for_bitsandbytes()
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: H100
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = torch.cuda.empty_cache = torch.cuda.reset_peak_memory_stats = lambda *_: None
    torch.cuda.max_memory_allocated = torch.cuda.memory_allocated = lambda *_: 0
    torch.cuda.mem_get_info = lambda *_: (70 << 30, 80 << 30)
    torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all = list, lambda states: None
    import unsloth
    import unsloth.models.llama as llama
    from unsloth.models.rl import PatchFastRL
    from unsloth.trainer import _patch_trl_trainer

    os.environ["UNSLOTH_ALLOW_CPU"] = "0"  # under it these two would leave trl as it is
    PatchFastRL(FastLanguageModel=unsloth.FastLanguageModel)
    _patch_trl_trainer()
    for module in _modules("unsloth"):
        names = vars(module)
        if "triton_cast" in names:  # tl.cast, which the interpreter does not take with a plain number
            module.triton_cast = lambda value, dtype: value.to(dtype) if hasattr(value, "to") else value
        if "DEVICE_COUNT" in names:
            module.DEVICE_COUNT = 1
        if "get_current_device" in names:
            module.get_current_device = lambda: 0
    load = unsloth.FastLanguageModel.from_pretrained
    unsloth.FastLanguageModel.from_pretrained = lambda **asked: _loaded(load(device_map={"": "cpu"}, **asked))
    # The interpreter cannot calculate in bf16, and Unsloth fuses LoRA in 16 bits only: told that it has these, it does
    # so in fp32, where its functions are as right.
    answer = llama._base_weight_dtype
    llama._base_weight_dtype = lambda layer: torch.float16 if fuse_lora else answer(layer)
    _show_the_card_to("fasttune")


fuse_lora = True  # False: what Unsloth does with an fp32 base


class Card(TorchFunctionMode):
    """While it is entered, every device "cuda" that torch is asked for is the CPU."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name == "cuda":
            return args[0]
        if function is torch.device or name in ("to", "_to_copy"):
            args = tuple(_here(argument, function is torch.device) for argument in args)
        if "device" in kwargs:
            kwargs["device"] = _here(kwargs["device"], True)
        return function(*args, **kwargs)


def _here(device: Any, number: bool) -> Any:
    """`device`, or the CPU for a GPU: "cuda:0", a torch.device, or its `number`."""
    if number and type(device) is int:
        return torch.device("cpu")
    kind = device.type if isinstance(device, torch.device) else device
    return torch.device("cpu") if isinstance(kind, str) and kind.partition(":")[0] == "cuda" else device


def _stand_in_for_bitsandbytes() -> None:
    """Unsloth asks of every layer whether it is one of bitsandbytes' 4-bit layers; the stack for a CPU has it not."""
    if importlib.util.find_spec("bitsandbytes"):
        return
    package, layers = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.nn")
    for module in (package, layers):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    package.nn, package.__version__ = layers, "0"
    for name in ("Linear4bit", "Linear8bitLt", "Params4bit"):
        setattr(layers, name, type(name, (), {}))


class _OfOneGpu(list):
    """What Unsloth keeps for every GPU, by the index of a device, which that of a CPU has not."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index or 0)

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index or 0, value)


def _loaded(found: tuple[Any, Any]) -> tuple[Any, Any]:
    for module in found[0].modules():
        for name in ("multi_gpu_cos_cached", "multi_gpu_sin_cached"):
            if name in vars(module):
                setattr(module, name, _OfOneGpu(vars(module)[name]))
    return found


def _show_the_card_to(package: str) -> None:
    """CUDA is available to what `package` asks, and to nobody else: the libraries would look for its driver."""
    from fasttune import chips, hardware

    available, detect = torch.cuda.is_available, hardware.detect

    def is_available() -> bool:
        return sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == package or available()

    torch.cuda.is_available = is_available
    hardware.detect = lambda *path: chips.with_gpu(detect(*path), "h100-80")


def _modules(package: str) -> Iterator[Any]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package and module is not None:
            yield module
