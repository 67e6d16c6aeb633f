"""Turn what a broken installation prints into what it means and the command that fixes it.

The texts are those that PyTorch, NumPy, glibc's loader and transformers really print.
"""

import re
import signal
import sys
import traceback
from dataclasses import dataclass, replace

from fasttune import stack
from fasttune.errors import last_line
from fasttune.verify import PIP, Result, install_command


@dataclass(frozen=True)
class Hint:
    """What a text means, and what helps: a command or an instruction, or packages to bring to their pins."""

    pattern: str
    meaning: str
    fix: str = ""
    reinstall: tuple[str, ...] = ()
    fatal: bool = False  # a check that passed although this was printed has failed: its kernels did not load


SUSPECT = "{suspect}"  # the package whose check failed
DISTRIBUTIONS = {"pil": "pillow", "google": "protobuf", "yaml": "pyyaml"}  # modules of another name
DRIVER = "install NVIDIA driver 580 or newer (or start the container with --gpus all), then: nvidia-smi"
NEWER_SYSTEM = "use a newer system image (Ubuntu 22.04, Debian 12 or later); for GLIBCXX also: unset LD_LIBRARY_PATH"
NUMPY = (
    r"compiled using NumPy 1\.x|numpy\.core\.multiarray failed to import|_ARRAY_API not found"
    r"|numpy\.dtype size changed|compiled against (?:NumPy )?(?:C-)?(?:ABI|API) version"
    r"|No module named 'numpy\._core|numpy\._core\.multiarray failed to import"
)
CUDA_FILE = (
    r"lib(?:cudart|cublas\w*|cudnn\w*|nvrtc|nccl|cusparse\w*|nvJitLink|cupti)\S*: cannot open shared object file"
)
# The first match wins: special cases stand before the general ones.
HINTS = (
    Hint(r"flash_attn.*undefined symbol",
         "flash-attn was compiled for another torch (its C++ ABI changes with every torch release)",
         f"{PIP} uninstall -y flash-attn", fatal=True),
    Hint(r"flash attention build does not support backward",
         "this build of FlashAttention has no backward, so it cannot train", f"{PIP} uninstall -y flash-attn-3"),
    Hint(r"operator torchvision::nms does not exist",
         "torchvision does not belong to this torch: the two are released as pairs",
         reinstall=("torch", "torchvision"), fatal=True),
    Hint(r"(lib(?:cu\w+|nv\w+|nccl)\.so\S*: undefined symbol: [^\s,]+)",  # https://github.com/pytorch/pytorch/issues/111469
         "CUDA libraries of two installations are mixed, nearly always because LD_LIBRARY_PATH names another one ({0})",
         "unset LD_LIBRARY_PATH, then run verify again", fatal=True),
    Hint(r"undefined symbol: (\S+)",
         "a compiled file was built against another version of a library it uses, nearly always torch (symbol {0})",
         reinstall=("torch", SUSPECT), fatal=True),
    Hint(r"libcuda\.so\S*: cannot open shared object file", "the NVIDIA driver is not visible here", DRIVER),
    Hint(CUDA_FILE, "the package was built for another CUDA version than the one in this environment",
         reinstall=("torch", SUSPECT)),
    Hint(r"(libbitsandbytes\w+\.so): cannot open|CUDA binary not found at \S*(libbitsandbytes\w+\.so)",
         "bitsandbytes has no binary for the CUDA version of this torch",
         reinstall=("bitsandbytes", "torch"), fatal=True),
    Hint(r"(\S+\.so\S*): cannot open shared object file", "the system library {0} is missing",
         "find and install it: apt-get install apt-file && apt-file update && apt-file search {0}", fatal=True),
    Hint(r"version [`'](GLIBC\w*_[\d.]+)' not found", "the package needs {0}, newer than this system's C/C++ library",
         NEWER_SYSTEM, fatal=True),
    Hint(NUMPY, "a package was compiled for another NumPy generation (1 and 2 differ in their binary interface)",
         reinstall=("numpy", SUSPECT), fatal=True),
    Hint(r"C extension: \S+ not built",
         "pandas' compiled part does not load, nearly always because NumPy is of another generation",
         reinstall=("numpy", "pandas"), fatal=True),
    Hint(r"`rope_scaling` must be a dictionary",
         "this transformers predates Llama 3.1's five-field rope_scaling (needs 4.43 or newer)",
         reinstall=("transformers",)),
    Hint(r"([\w-]+)[<>=!]\S* is required for a normal functioning of this module, but found (\S+?)\.?(?:\s|$)",
         "this transformers refuses {1}", reinstall=("transformers", "{0}")),
    Hint(r"Found an incompatible version of (\w+)\. Found version (\S+), but only versions above (\S+)",
         "{0} {1} is too old here, {2} is needed", reinstall=("{0}",)),
    Hint(r"Descriptors cannot be created directly",
         "protobuf and the code that was generated for it are of different times", reinstall=("protobuf", SUSPECT)),
    Hint(r"Failed to find C compiler", "Triton compiles its kernels with a C compiler, and there is none",
         "apt-get install -y gcc"),
    Hint(r"Python\.h: No such file or directory",
         "Triton compiles its kernels against Python's headers, and they are missing",
         "apt-get install -y python{}.{}-dev".format(*sys.version_info)),
    Hint(r"no kernel image is available for execution", "the binary holds no code for this GPU's architecture",
         reinstall=("torch", SUSPECT)),
    Hint(r"driver on your system is too old|driver version is insufficient|Found no NVIDIA driver",
         "the NVIDIA driver is missing or too old for this CUDA build", DRIVER),
    Hint(r"Torch not compiled with CUDA enabled", "this is the CPU build of torch", "bash scripts/setup_h100.sh"),
    Hint(r"No space left on device", "the disk is full", "df -h; then free some space"),
    Hint(r"out of memory|std::bad_alloc|DefaultCPUAllocator: can't allocate memory", "memory ran out",
         "free memory (nvidia-smi and free -g show who holds it), then run verify again"),
    Hint(r"No module named '([\w.]+)'", "the module {0} is missing, or its package has another version",
         reinstall=(SUSPECT, "{0}")),
    Hint(r"cannot import name '(\w+)' from '([\w.]+)'",
         "{1} has no {0}: its version does not fit the package that asks", reinstall=(SUSPECT, "{1}")),
)  # fmt: skip

SIGNALS = {
    signal.SIGSEGV: "crashed (SIGSEGV): a compiled file does not fit the others, usually one built for another torch",
    signal.SIGILL: "crashed (SIGILL): the binary uses instructions that this CPU does not have",
    signal.SIGABRT: "aborted (SIGABRT): a library found itself in a state that cannot be",
    signal.SIGBUS: "crashed (SIGBUS): a file mapped into memory is cut short, or /dev/shm is full",
    signal.SIGKILL: "was killed (SIGKILL): nearly always the kernel, out of memory",
}


def explain(text: str, suspect: str = "") -> Hint | None:
    """The first hint that fits `text`, filled in, its fix a command; or None. `suspect` is the module under test."""
    for hint in HINTS:
        match = re.search(hint.pattern, text)
        if match is None:
            continue
        groups = match.groups()
        packages = [distribution_of(name.format(*groups, suspect=suspect)) for name in hint.reinstall]
        fix = hint.fix.format(*groups) or install_command(*dict.fromkeys(filter(None, packages)))
        return replace(hint, meaning=hint.meaning.format(*groups), fix=fix)
    return None


def distribution_of(module: str) -> str:
    """The package that a module is part of: `PIL._util` → pillow, `unsloth_zoo.utils` → unsloth-zoo."""
    name = stack.canonical(module.split(".")[0])
    return DISTRIBUTIONS.get(name, name)


def from_exception(name: str, error: BaseException, suspect: str = "") -> Result:
    """A failed result for an exception: its meaning where we know it, its text where we do not."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    known = explain("\n".join(str(link) for link in chain), raised_by(chain[-1]) or suspect)
    if known is None:
        return Result(name, "fail", line[:400])
    return Result(name, "fail", f"{known.meaning} ({line[:200]})", known.fix)


def raised_by(error: BaseException) -> str:
    """The package whose code raised: the last one under site-packages in the traceback, or empty."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [re.search(r"/site-packages/(?!fasttune\b)(\w+)", file) for file in files]
    return next((match[1] for match in reversed(found) if match), "")


def from_exit(name: str, returncode: int, output: str, suspect: str = "") -> Result:
    """A failed result for a process that ended without an answer; `output` is what it printed."""
    known = explain(output, suspect)
    if returncode < 0:
        what = SIGNALS.get(signal.Signals(-returncode), f"was ended by signal {-returncode}")
        # A crash without words: reinstalling the package under test helps most often.
        fix = known.fix if known else install_command("torch", *([suspect] if suspect else []))
        return Result(name, "fail", f"its process {what}" + (f"; {known.meaning}" if known else ""), fix)
    if known is not None:
        return Result(name, "fail", known.meaning, known.fix)
    last = last_line(output, "it printed nothing")[:300]
    return Result(name, "fail", f"its process ended with exit code {returncode}: {last}")
