"""Turn what a broken installation prints into what it means and the command that mends it.

The texts are those that PyTorch, NumPy, glibc's loader, transformers and xformers really print.
"""

import re
import signal
import sys
import traceback
from dataclasses import dataclass

from fasttune import stack
from fasttune.verify import Result, Status, install_command


@dataclass(frozen=True)
class Symptom:
    """`reinstall` names the packages to bring to their pins; the suspect is the package whose check failed.

    `printed` is what a check becomes that passed although this was printed: some libraries go on without their kernels.
    """

    pattern: str
    meaning: str
    reinstall: tuple[str, ...] = ()
    fix: str = ""
    printed: Status | None = None


SUSPECT = "{suspect}"
DISTRIBUTIONS = {"pil": "pillow", "google": "protobuf", "yaml": "pyyaml"}  # modules of another name
DRIVER = "install NVIDIA driver 580 or newer (or start the container with --gpus all), then: nvidia-smi"
# The first match wins: special cases stand before the general ones.
SYMPTOMS = (
    Symptom(
        r"xFormers can't load C\+\+/CUDA extensions",
        "xformers' own kernels were built for another torch and are off; what reaches PyTorch's kernels still works",
        fix="nothing, if attention:xformers passes; for its own kernels: torch 2.10.0+cu128 beside xformers 0.0.35",
        printed="warn",
    ),
    Symptom(
        r"flash_attn\S*: undefined symbol|flash_attn.*undefined symbol",
        "flash-attn was compiled for another torch (its C++ ABI changes with every torch release)",
        fix=f"{sys.executable} -m pip uninstall -y flash-attn",
        printed="fail",
    ),
    Symptom(
        r"operator torchvision::nms does not exist",
        "torchvision does not belong to this torch: the two are released as pairs",
        ("torch", "torchvision"),
        printed="fail",
    ),
    Symptom(
        r"(lib(?:cu\w+|nv\w+|nccl)\.so\S*: undefined symbol: [^\s,]+)",
        "CUDA libraries of two installations are mixed, nearly always because LD_LIBRARY_PATH names another one ({0})",
        fix="unset LD_LIBRARY_PATH, then run verify again",  # https://github.com/pytorch/pytorch/issues/111469
        printed="fail",
    ),
    Symptom(
        r"undefined symbol: (\S+)",
        "a compiled file was built against another version of a library it uses, nearly always torch (symbol {0})",
        ("torch", SUSPECT),
        printed="fail",
    ),
    Symptom(r"libcuda\.so\S*: cannot open shared object file", "the NVIDIA driver is not visible here", fix=DRIVER),
    Symptom(
        r"lib(?:cudart|cublas\w*|cudnn\w*|nvrtc|nccl|cusparse\w*|nvJitLink|cupti)\S*: cannot open shared object file",
        "the package was built for another CUDA version than the one in this environment",
        ("torch", SUSPECT),
    ),
    Symptom(
        r"(libbitsandbytes\w+\.so): cannot open|CUDA binary not found at \S*(libbitsandbytes\w+\.so)",
        "bitsandbytes has no binary for the CUDA version of this torch",
        ("bitsandbytes", "torch"),
        printed="fail",
    ),
    Symptom(
        r"(\S+\.so\S*): cannot open shared object file",
        "the system library {0} is missing",
        fix="find and install it: apt-get install apt-file && apt-file update && apt-file search {0}",
        printed="fail",
    ),
    Symptom(
        r"version [`'](GLIBC\w*_[\d.]+)' not found",
        "the package needs {0}, newer than this system's C/C++ library",
        fix="use a newer system image (Ubuntu 22.04, Debian 12 or later); for GLIBCXX also: unset LD_LIBRARY_PATH",
        printed="fail",
    ),
    Symptom(
        r"compiled using NumPy 1\.x|numpy\.core\.multiarray failed to import|_ARRAY_API not found"
        r"|numpy\.dtype size changed|compiled against (?:NumPy )?(?:C-)?(?:ABI|API) version"
        r"|No module named 'numpy\._core|numpy\._core\.multiarray failed to import",
        "a package was compiled for another NumPy generation (1 and 2 differ in their binary interface)",
        ("numpy", SUSPECT),
        printed="fail",
    ),
    Symptom(
        r"C extension: \S+ not built",
        "pandas' compiled part does not load, nearly always because NumPy is of another generation",
        ("numpy", "pandas"),
        printed="fail",
    ),
    Symptom(
        r"`rope_scaling` must be a dictionary",
        "this transformers predates Llama 3.1's five-field rope_scaling (needs 4.43 or newer)",
        ("transformers",),
    ),
    Symptom(
        r"([\w-]+)[<>=!]\S* is required for a normal functioning of this module, but found (\S+?)\.?(?:\s|$)",
        "this transformers refuses {1}",
        ("transformers", "{0}"),
    ),
    Symptom(
        r"Found an incompatible version of (\w+)\. Found version (\S+), but only versions above (\S+)",
        "{0} {1} is too old here, {2} is needed",
        ("{0}",),
    ),
    Symptom(
        r"Descriptors cannot be created directly",
        "protobuf and the code that was generated for it are of different times",
        ("protobuf", SUSPECT),
    ),
    Symptom(
        r"Failed to find C compiler",
        "Triton compiles its kernels with a C compiler, and there is none",
        fix="apt-get install -y gcc",
    ),
    Symptom(
        r"Python\.h: No such file or directory",
        "Triton compiles its kernels against Python's headers, and they are missing",
        fix=f"apt-get install -y python{sys.version_info[0]}.{sys.version_info[1]}-dev",
    ),
    Symptom(
        r"no kernel image is available for execution",
        "the binary holds no code for this GPU's architecture",
        ("torch", SUSPECT),
    ),
    Symptom(
        r"driver on your system is too old|driver version is insufficient|Found no NVIDIA driver",
        "the NVIDIA driver is missing or too old for this CUDA build",
        fix=DRIVER,
    ),
    Symptom(
        r"Torch not compiled with CUDA enabled", "this is the CPU build of torch", fix="bash scripts/setup_h100.sh"
    ),
    Symptom(r"No space left on device", "the disk is full", fix="df -h; then free some space"),
    Symptom(
        r"out of memory|std::bad_alloc|DefaultCPUAllocator: can't allocate memory",
        "memory ran out",
        fix="free memory (nvidia-smi and free -g show who holds it), then run verify again",
    ),
    Symptom(
        r"No module named '([\w.]+)'", "the module {0} is missing, or its package has another version", (SUSPECT, "{0}")
    ),
    Symptom(
        r"cannot import name '(\w+)' from '([\w.]+)'",
        "{1} has no {0}: its version does not fit the package that asks",
        (SUSPECT, "{1}"),
    ),
)

SIGNALS = {
    signal.SIGSEGV: "crashed (SIGSEGV): a compiled file does not fit the others, usually one built for another torch",
    signal.SIGILL: "crashed (SIGILL): the binary uses instructions that this CPU does not have",
    signal.SIGABRT: "aborted (SIGABRT): a library found itself in a state that cannot be",
    signal.SIGBUS: "crashed (SIGBUS): a file mapped into memory is cut short, or /dev/shm is full",
    signal.SIGKILL: "was killed (SIGKILL): nearly always the kernel, out of memory",
}


@dataclass(frozen=True)
class Explanation:
    meaning: str
    fix: str
    printed: Status | None


def explain(text: str, suspect: str = "") -> Explanation | None:
    """The first known symptom in `text`, or None. `suspect` is the distribution under test."""
    for symptom in SYMPTOMS:
        match = re.search(symptom.pattern, text)
        if match is None:
            continue
        groups = match.groups()
        packages = [distribution_of(name.format(*groups, suspect=suspect)) for name in symptom.reinstall]
        packages = list(dict.fromkeys(name for name in packages if name))
        fix = symptom.fix.format(*groups) if symptom.fix else install_command(*packages)
        return Explanation(symptom.meaning.format(*groups), fix, symptom.printed)
    return None


def distribution_of(module: str) -> str:
    """The package that a module is part of: `PIL._util` → pillow, `unsloth_zoo.utils` → unsloth-zoo."""
    name = stack.canonical(module.split(".")[0])
    return DISTRIBUTIONS.get(name, name)


def culprit(error: BaseException) -> str:
    """The package whose code raised: the last one under site-packages in the traceback, or empty."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [re.search(r"/site-packages/(?!fasttune\b)(\w+)", file) for file in files]
    return next((match[1] for match in reversed(found) if match), "")


def from_exception(name: str, error: BaseException, suspect: str = "") -> Result:
    """A failed result for an exception: its meaning where we know it, its last line where we do not."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    known = explain("\n".join(str(link) for link in chain), culprit(chain[-1]) or suspect)
    if known is None:
        return Result(name, "fail", line[:400])
    return Result(name, "fail", f"{known.meaning} ({line[:200]})", known.fix)


def from_exit(name: str, returncode: int, output: str, suspect: str = "") -> Result:
    """A failed result for a process that ended without an answer; `output` is what it printed."""
    known = explain(output, suspect)
    if returncode < 0:
        number = -returncode
        what = SIGNALS.get(signal.Signals(number), f"was ended by signal {number}")
        # A crash without words: reinstalling the package under test is the likeliest cure.
        fix = known.fix if known else install_command("torch", *([suspect] if suspect else []))
        return Result(name, "fail", f"its process {what}" + (f"; {known.meaning}" if known else ""), fix)
    if known is not None:
        return Result(name, "fail", known.meaning, known.fix)
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "it printed nothing")
    return Result(name, "fail", f"its process ended with exit code {returncode}: {last[:300]}")
