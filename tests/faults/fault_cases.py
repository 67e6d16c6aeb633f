"""What users arrive with, as data: the environment, what `fasttune verify` must say of it and the fix that must help.

`test_environments.py` builds and runs every case; `fault_table.py` makes the table of docs/compatibility.md of them.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fasttune import stack

H200 = "NVIDIA H200, 9.0, 143771, 580.65.06"
OLD_TRANSFORMERS = {"transformers": "4.41.0", "tokenizers": "0.19.1"}


@dataclass(frozen=True)
class Case:
    """One environment. Exactly one of `pinned`/`uninstalled` (the pip command of the fix) or `remedy` (its words)."""

    name: str
    arrives: str  # the table: with what
    wrong: str  # the table: what goes wrong
    check: str  # of verify; `setup`: scripts/setup_h100.sh; `stderr`: a line instead of results
    says: str  # words of its detail
    status: str = "fail"
    pinned: tuple[str, ...] = ()  # the fix installs exactly these, patterns allowed, at the pins of `pins_of`
    uninstalled: tuple[str, ...] = ()
    remedy: str = ""
    pins_of: str = ""  # default: the stack of the environment
    leads_to: str = ""  # the stack that the set-up named by the remedy chooses
    fixed: Mapping[str, Any] = field(default_factory=dict)  # the case after its remedy in words
    after: str = ""  # the check that must pass after the fix, where it is another one
    # the environment: the pins of `stack`, changed
    stack: str = "cpu"
    versions: Mapping[str, str | None] = field(default_factory=dict)  # None: not installed
    requires: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # what packages declare to need
    files: Mapping[str, str] = field(default_factory=dict)  # in site-packages
    removed_files: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()  # what nvidia-smi answers: name, compute capability, MiB, driver
    nvidia_smi: str = ""  # what a failing nvidia-smi says
    compiler: bool = True  # gcc on PATH
    real: bool = False  # the tests' own packages behind the stubs
    applied: bool = True  # False: another case applies the same fix
    nightly: bool = False  # applied at night only


# What the pinned packages declare of each other (a test compares it with the installed ones).
_UNSLOTH = (
    "torch<2.15.0,>=2.4.0",
    "transformers!=4.57.0,!=5.0.0,!=5.1.0,<=5.17.0,>=4.52.4",
    "trl!=0.19.0,<=1.15.0,>=0.18.2",
    "datasets!=4.0.*,!=4.1.0,!=4.4.*,!=4.5.0,<5.0.0,>=3.4.1",
    "peft!=0.11.0,>=0.18.0",
)
_PINS = stack.read_pins("cpu")
REQUIRES: dict[tuple[str, str], tuple[str, ...]] = {
    ("unsloth", _PINS["unsloth"]): _UNSLOTH,
    ("transformers", _PINS["transformers"]): (
        "huggingface-hub<2.0,>=1.5.0",
        "tokenizers<0.24.0,>=0.23.1",
        "safetensors>=0.8.0",
    ),
    ("trl", _PINS["trl"]): ("accelerate>=1.4.0", "datasets>=4.7.0", "transformers>=4.56.2"),
    ("pandas", _PINS["pandas"]): ("numpy>=2.0.2",),
    ("torchvision", stack.read_pins("cu130")["torchvision"]): ("torch==2.11.0",),
    ("torchvision", "0.25.0"): ("torch==2.10.0",),
}


def metadata(name: str, version: str) -> str:
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"


def fails(text: str, error: str = "ImportError") -> str:
    return f"raise {error}({text!r})\n"


def only_beside(package: str, version: str) -> str:
    """The beginning of a module whose next line is run only while `version` of `package` is installed."""
    return f"import importlib.metadata\nif importlib.metadata.version({package!r}) == {version!r}:\n    "


def at_start(code: str) -> dict[str, str]:
    """Files that run `code` when the interpreter starts, before anything else."""
    return {"fault.pth": "import fault_at_start\n", "fault_at_start.py": code}


PYTHON_IS = """
import collections, sys, warnings
warnings.deprecated = lambda *words, **options: lambda thing: thing  # libraries take it from a newer Python
fields = collections.namedtuple("fields", "major minor micro releaselevel serial")
sys.version_info = fields(3, {minor}, 0, "final", 0)
"""
NO_DISK = at_start("""
import os
real = os.statvfs
def full(path):
    seen = real(path)
    return os.statvfs_result((*seen[:3], seen.f_bfree // 10**6, seen.f_bavail // 10**6, *seen[5:]))
os.statvfs = full
""")
NO_HEADERS = """
import sysconfig
real = sysconfig.get_paths
sysconfig.get_paths = lambda *scheme: real(*scheme) | {"include": "/nowhere"}
"""
COLAB = {  # a part of what such an image brings
    "numpy": "2.0.2", "pandas": "2.2.2", "pillow": "11.3.0", "protobuf": "5.29.5", "transformers": "4.57.1",
    "tokenizers": "0.22.1", "huggingface-hub": "0.36.0", "datasets": "4.0.0", "torchao": "0.10.0", "peft": "0.17.1",
    "tensorflow": "2.19.0", "opencv-python": "4.12.0.88", "torchaudio": "2.9.0", "unsloth": None, "trl": None,
}  # fmt: skip
OLD_LIST = {
    "transformers": "4.43.3", "tokenizers": "0.19.1", "trl": "0.8.6", "peft": "0.11.1", "accelerate": "0.30.1",
    "numpy": "1.26.4", "unsloth": "2024.7", "unsloth-zoo": None, "datasets": "2.20.0", "huggingface-hub": "0.23.5",
}  # fmt: skip
PYTHON_DEV = "python{}.{}-dev".format(*sys.version_info)
SITE = "/env/lib/python3.11/site-packages"
ON_GPU: dict[str, Any] = {"stack": "cu130", "gpus": (H200,), "requires": {"torch": ("triton==3.6.0",)}}

PYTHON = (
    Case("python-3.9-verify", "an environment of Python 3.9", "a SyntaxError or TypeError far inside", "stderr",
         "needs Python 3.11 to 3.13, this is 3.9", remedy="bash scripts/setup_h100.sh", leads_to="cpu",
         files=at_start(PYTHON_IS.format(minor=9))),
    Case("python-3.14-verify", "an environment of Python 3.14", "pins that do not install", "python",
         "made for 3.11 to 3.13", remedy="bash scripts/setup_h100.sh --recreate",
         files=at_start(PYTHON_IS.format(minor=14)), fixed={"files": {}}),
)  # fmt: skip
MACHINE = (
    Case("no-disk-setup", "too little disk for the stack", "pip dies half way: \"No space left on device\"", "setup",
         "the stack cpu needs 4 GiB", remedy="name a folder on another disk with --venv", files=NO_DISK,
         fixed={"files": {}}),
    Case("no-disk", "a full disk", "the run dies at its first checkpoint", "disk", "GiB free",
         remedy="free at least 2 GiB", files=NO_DISK, fixed={"files": {}}),
    Case("gpu-too-old", "a T4 or another GPU before Ampere", "no bf16, no Flash Attention", "gpu",
         "bf16 and Flash Attention need 8.0", remedy="use an Ampere or newer GPU",
         gpus=("Tesla T4, 7.5, 15360, 580.65.06",), fixed={"gpus": (H200,)}),
    Case("no-such-gpu", "CUDA_VISIBLE_DEVICES of another machine", "all runs on the CPU", "stderr",
         "CUDA_VISIBLE_DEVICES=4: names no GPU of this machine", remedy="unset CUDA_VISIBLE_DEVICES", gpus=(H200, H200),
         environ={"CUDA_VISIBLE_DEVICES": "4"}, fixed={"environ": {"CUDA_VISIBLE_DEVICES": "1"}}, after="gpu"),
    Case("no-compiler-setup", "a GPU machine without gcc", "Triton fails at the first step", "setup",
         "needs a C compiler", remedy="apt-get install -y gcc", compiler=False, gpus=(H200,),
         fixed={"compiler": True}),
    Case("no-compiler", "the same, set up elsewhere", "the same", "compiler", "needs a C compiler",
         remedy="apt-get install -y gcc", compiler=False, fixed={"compiler": True}, **ON_GPU),
    Case("no-headers", "a Python without its headers", "Triton's compiler: \"Python.h: No such file\"", "compiler",
         "Python's headers (/nowhere/Python.h)", remedy=f"apt-get install -y {PYTHON_DEV}", fixed={"files": {}},
         **ON_GPU | {"files": at_start(NO_HEADERS)}),
    Case("driver-upgraded", "a driver upgraded under the running kernel", "no GPU until the next boot", "driver",
         "Driver/library version mismatch", "warn", remedy="reboot",
         nvidia_smi="Failed to initialize NVML: Driver/library version mismatch", fixed={"gpus": (H200,)}),
    Case("no-gpu-in-container", "a container without --gpus", "nvidia-smi finds nothing, all runs on the CPU", "driver",
         "No devices were found", "warn", remedy="start it with --gpus all", nvidia_smi="No devices were found",
         fixed={"gpus": (H200,)}),
    Case("driver-470", "a driver before 525", "`torch.cuda.is_available()` is False", "driver",
         "470.223.02, 525 is needed", remedy="update it to 580 or newer",
         fixed={"gpus": (H200,)}, **ON_GPU | {"gpus": ("NVIDIA H100, 9.0, 81559, 470.223.02",)}),
    Case("driver-550", "a driver 525 to 579 with a CUDA 13 build of torch", "`torch.cuda.is_available()` is False",
         "rule:driver-cuda-13", "needs driver 580, 550.54.15", pins_of="cu12",
         pinned=("torch", "torchvision", "nvidia-*", "cuda-*"),
         **ON_GPU | {"gpus": ("NVIDIA H100, 9.0, 81559, 550.54.15",)}),
    Case("cpu-torch-on-gpu", "a CPU build of torch on a GPU machine", "the GPU idles", "rule:torch-cpu-build",
         "cannot use the NVIDIA H200", remedy="bash scripts/setup_h100.sh --recreate", leads_to="cu130", gpus=(H200,)),
    Case("cuda-11-hopper", "a CUDA 11.8 build on Hopper", "works, slowly", "rule:cuda-11-hopper", "2.3.1+cu118", "warn",
         pinned=("torch", "torchvision", "triton", "nvidia-*", "cuda-*"), **ON_GPU | {"versions": {
             "torch": "2.3.1+cu118", "torchvision": "0.18.1", "triton": "2.3.1", "nvidia-*": None, "cuda-*": None}}),
)  # fmt: skip
VERSIONS = (
    Case("transformers-too-old", "transformers < 4.43", "Llama 3.1: \"`rope_scaling` must be a dictionary with two"
         " fields\"", "rule:llama-3.1-transformers", "4.41.0 is older than 4.43", pinned=("transformers", "tokenizers"),
         nightly=True, versions=OLD_TRANSFORMERS, requires={"transformers": ("tokenizers<0.20,>=0.19",)}),
    Case("trl-too-new", "trl newer than unsloth knows (torch, transformers and peft have limits, too)",
         "errors deep inside a trainer", "rule:unsloth-limits",
         "1.16.0 is installed", nightly=True, pinned=("trl",), versions={"trl": "1.16.0"}),
    Case("datasets-4.4", "datasets 4.4", "recursion errors, for which unsloth excludes it", "rule:unsloth-limits",
         "4.4.0 is installed", pinned=("datasets",), versions={"datasets": "4.4.0"}, applied=False),
    Case("tokenizers-of-another-time", "tokenizers or huggingface-hub of another time than transformers",
         "an ImportError at import", "rule:hugging-face-limits", "tokenizers<0.24.0,>=0.23.1, 0.21.0",
         pinned=("tokenizers", "huggingface-hub"), versions={"tokenizers": "0.21.0", "huggingface-hub": "0.36.0"}),
    Case("tokenizers-refused", "the same, imported", "\"tokenizers… is required for a normal functioning\"",
         "import:transformers", "this transformers refuses tokenizers==0.21.0", pinned=("tokenizers",), real=True,
         versions={"tokenizers": "0.21.0"}, applied=False),
    Case("unsloth-2024", "unsloth until about 2026.8 without a GPU", "NotImplementedError", "rule:unsloth-cpu",
         "2024.7 on a machine without a GPU", pinned=("unsloth", "unsloth-zoo"),
         versions={"unsloth": "2024.7", "unsloth-zoo": "2024.7"}, applied=False),
    Case("pin-list-of-2024", "a pin list of 2024 (transformers 4.43.3, trl 0.8, numpy 1.26, unsloth 2024.7)",
         "each of these packages refuses another one", "pins", "10 of", pinned=tuple(OLD_LIST), versions=OLD_LIST),
    Case("numpy-1", "numpy 1.26 with packages that need 2", "an ImportError in pandas", "rule:numpy-abi",
         "pandas {pandas} needs numpy>=2.0.2, 1.26.4", nightly=True, pinned=("numpy",), versions={"numpy": "1.26.4"}),
    Case("pandas-for-numpy-1", "pandas, pyarrow … built for numpy 1", "\"numpy.dtype size changed\"", "import:datasets",
         "another NumPy generation", pinned=("pandas",), applied=False, versions={"pandas": "2.1.4"}, files={
             "datasets/__init__.py": "import pandas\nDataset = object\n", "pandas/__init__.py": fails(
                 "numpy.dtype size changed, may indicate binary incompatibility. Expected 96 from C header, got 88 from"
                 " PyObject", "ValueError")}),
    Case("pandas-built-wrongly", "the right versions, one of them built from source against another numpy", "the same",
         "import:datasets", "another NumPy generation", nightly=True, pinned=("numpy", "pandas"), files={
             "datasets/__init__.py": "import pandas\nDataset = object\n", "pandas/__init__.py": fails(
                 "numpy.core.multiarray failed to import")}),
    Case("torch-for-numpy-1", "torch before 2.3 with numpy 2", "\"A module that was compiled using NumPy 1.x cannot be"
         " run in NumPy 2\", and it continues without", "import:torch", "another NumPy generation", pinned=("torch",),
         applied=False, versions={"torch": "2.2.2"}, files={"torch/__init__.py": "import sys\n"
         "nn = __version__ = '2.2.2'\nprint('A module that was compiled using NumPy 1.x cannot be run in NumPy 2.4.6',"
         " file=sys.stderr)\n"}),
    Case("numpy-abort", "an extension that aborts under another numpy's C API", "Python itself dies", "import:datasets",
         "SIGABRT", pinned=("pyarrow",), applied=False, versions={"pyarrow": "14.0.2"}, files={
             "datasets/__init__.py": "import pyarrow\nDataset = object\n", "pyarrow/__init__.py": "import os, sys\n"
             "print('RuntimeError: module compiled against ABI version 0x1000009', file=sys.stderr, flush=True)\n"
             "os.abort()\n"}),
    Case("torchvision-other-torch", "torchvision for another torch", "its operators are not registered",
         "rule:torchvision-torch", "torchvision 0.25.0 needs torch==2.10.0, 2.11.0+cu130",
         pinned=("torchvision",), applied=False, **ON_GPU | {"versions": {"torchvision": "0.25.0"}}),
    Case("torchvision-nms", "the same, imported", "\"operator torchvision::nms does not exist\"", "import:torchvision",
         "released as pairs", pinned=("torchvision",), **ON_GPU | {"versions": {"torchvision": "0.25.0"}, "files": {
             "torchvision/__init__.py": fails("operator torchvision::nms does not exist", "RuntimeError")}}),
    Case("torchvision-on-cpu", "a stray torchvision beside the CPU stack, which does without",
         "transformers imports it and fails", "rule:torchvision-torch", "needs torch==2.10.0, 2.13.0",
         uninstalled=("torchvision",),
         versions={"torchvision": "0.25.0"}),
    Case("triton-other-torch", "a triton other than the one torch's CUDA build pins", "compile errors, missing kernels",
         "rule:triton-torch", "needs triton==3.6.0, 3.5.0", pinned=("triton",), applied=False,
         **ON_GPU | {"versions": {"triton": "3.5.0"}}),
    Case("torchao-of-colab", "torchao 0.10 of a Colab image", "peft refuses to put an adapter on", "import:peft",
         "torchao 0.10.0 is too old here", nightly=True, pinned=("torchao",), versions={"torchao": "0.10.0"}, files={
             "peft/__init__.py": only_beside("torchao", "0.10.0") + fails("Found an incompatible version of torchao. "
             "Found version 0.10.0, but only versions above 0.16.0 are supported") + "LoraConfig = object\n"}),
    Case("pillow-of-colab", "an old Pillow under a newer package", "\"cannot import name … from 'PIL…'\"", "import:trl",
         "PIL._typing has no Buffer", pinned=("pillow",), applied=False,
         versions={"pillow": "10.0.0", "tqdm": "4.60.0"}, files={
             "PIL/__init__.py": "", "PIL/_typing.py": "", "trl/__init__.py": only_beside("pillow", "10.0.0")
             + "from PIL._typing import Buffer\nSFTTrainer = object\n"}),
    Case("protobuf-of-colab", "an old protobuf", "\"Descriptors cannot be created directly\"", "import:tokenizers",
         "of different times", pinned=("protobuf",), applied=False, versions={"protobuf": "3.20.3"}, files={
             "tokenizers/__init__.py": only_beside("protobuf", "3.20.3")
             + fails("Descriptors cannot be created directly.", "TypeError") + "Tokenizer = object\n"}),
)  # fmt: skip
BINARIES = (
    Case("flash-attn-symbol", "flash-attn built for another torch, CUDA or ABI", "\"undefined symbol\" at import",
         "import:flash_attn", "flash-attn was compiled for another torch", nightly=True, uninstalled=("flash-attn",),
         **ON_GPU | {"versions": {"flash-attn": "2.8.3"}, "files": {"flash_attn/__init__.py": fails(
             f"{SITE}/flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN3c105ErrorC2ENS_14Source"
             "LocationESs")}}),
    Case("flash-attn-wheel", "a wheel of flash-attn whose name says another torch", "the same, when it is imported",
         "rule:flash-attn-torch", "built for torch 2.8, torch 2.11.0+cu130", remedy="-m pip uninstall -y flash-attn &&"
         " bash scripts/setup_h100.sh --flash-attn auto", fixed={"versions": {}},
         **ON_GPU | {"versions": {"flash-attn": "2.8.3+cu12torch2.8cxx11abitrue"}}),
    Case("flash-attn-3-behind-2", "FlashAttention 3 beside flash-attn 2", "Unsloth takes flash-attn 2",
         "flash-attention-3", "takes flash-attn 2.8.3 first", "warn", nightly=True, uninstalled=("flash-attn",),
         **ON_GPU | {"versions": {"flash-attn": "2.8.3"}, "files": {"flash_attn_interface.py": ""}}),
    Case("flash-attn-3-half", "FlashAttention 3 without its interface", "Unsloth does not find it", "flash-attention-3",
         "not flash_attn_interface", "warn", remedy="reinstall it, as docs/compatibility.md says",
         fixed={"files": {"flash_attn_3/__init__.py": "", "flash_attn_interface.py": ""}},
         **ON_GPU | {"files": {"flash_attn_3/__init__.py": ""}}),
    Case("bitsandbytes-no-binary", "bitsandbytes without a binary for this CUDA", "it says so and continues, 4-bit"
         " fails later", "import:bitsandbytes", "no binary for the CUDA version", pinned=("bitsandbytes",),
         applied=False, **ON_GPU | {"versions": {"bitsandbytes": "0.45.5"}, "files": {
         "bitsandbytes/__init__.py": "import sys\nfunctional = 0\nprint('bitsandbytes library load error: Configured"
         " CUDA binary not found at /x/libbitsandbytes_cuda130.so', file=sys.stderr)\n"}}),
    Case("segmentation-fault", "a compiled package that takes Python down", "the process is gone, without a word",
         "import:bitsandbytes", "SIGSEGV", pinned=("bitsandbytes",), applied=False,
         **ON_GPU | {"versions": {"bitsandbytes": "0.43.3"}, "files": {
             "bitsandbytes/__init__.py": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"}}),
    Case("ld-library-path", "LD_LIBRARY_PATH with another CUDA", "\"undefined symbol: __nvJitLink…\"",
         "import:torch", "CUDA libraries of two installations are mixed", remedy="unset LD_LIBRARY_PATH",
         environ={"LD_LIBRARY_PATH": "/usr/local/cuda-12.1/lib64"}, fixed={"environ": {}}, **ON_GPU | {"files": {
             "torch/__init__.py": "import os\nnn = __version__ = '2.11.0'\nif 'LD_LIBRARY_PATH' in os.environ:\n    "
             + fails(f"{SITE}/torch/lib/../../nvidia/cusparse/lib/libcusparse.so.12: undefined symbol: "
                     "__nvJitLinkComplete_12_4, version libnvJitLink.so.12")}}),
    Case("old-libstdc++", "an old system, or a conda whose C++ library comes first", "\"version `GLIBCXX…' not found\"",
         "import:datasets", "needs GLIBCXX_3.4.32", remedy="use a newer system image", fixed={"files": {}}, files={
             "datasets/__init__.py": fails("/opt/conda/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required"
             " by libarrow.so)")}),
    Case("no-libcuda", "a CUDA package in a container without --gpus", "\"libcuda.so.1: cannot open shared object\"",
         "import:triton", "the NVIDIA driver is not visible here", remedy="start the container with --gpus all",
         fixed={"files": {}}, stack="cu130", files={"triton/__init__.py": fails(
             "libcuda.so.1: cannot open shared object file: No such file or directory")}),
)  # fmt: skip
INSTALLATION = (
    Case("no-tyro", "unsloth installed with --no-deps", "\"No module named 'tyro'\"", "import:unsloth",
         "the module tyro is missing", pinned=("tyro",), versions={"tyro": None}, after="pins", real=True,
         files={"unsloth/__init__.py": "import tyro\n"}),
    Case("no-packaging", "an environment without `packaging`", "nobody can compare versions", "rule:unsloth-limits",
         "No module named 'packaging'", pinned=("packaging",), versions={"packaging": None}, after="pins",
         files={"packaging/__init__.py": fails("No module named 'packaging'", "ModuleNotFoundError")}),
    Case("code-gone", "a package whose files are gone and whose metadata is there", "pip says \"already satisfied\"",
         "import:trl", "is not installed", pinned=("trl",), removed_files=("trl",)),
    Case("metadata-gone", "a pip that was killed: a .dist-info without METADATA", "pip warns and skips it", "pins",
         "trl missing", pinned=("trl",), removed_files=("trl-{trl}.dist-info/METADATA",)),
    Case("record-gone", "a package without RECORD (Debian's, or half removed)", "pip: \"Cannot uninstall\"",
         "site-packages", "has lost its RECORD", remedy="bash scripts/setup_h100.sh --recreate", leads_to="cpu",
         versions={"trl": "1.16.0"}, removed_files=("trl-1.16.0.dist-info/RECORD",)),
    Case("installed-twice", "two versions of one package in one folder", "pip and Python may each see another one",
         "site-packages", "transformers is there twice", remedy="bash scripts/setup_h100.sh --recreate", leads_to="cpu",
         files={"transformers-4.41.0.dist-info/METADATA": metadata("transformers", "4.41.0")}),
    Case("left-by-pip", "`~ransformers-….dist-info` of a killed pip", "nothing: it is skipped, as pip does", "pins",
         "as stacks/cpu.txt pins them", "pass", remedy="",
         files={f"~{name[1:]}-0.1.dist-info/METADATA": metadata(name, "0.1")
                for name in ("transformers", "trl", "peft", "numpy", "datasets", "tokenizers")}),
    Case("pythonpath", "PYTHONPATH with packages of its own (cluster modules, ROS …)", "they win over the environment,"
         " whatever pip installs", "site-packages", "(PYTHONPATH)", remedy="unset PYTHONPATH",
         environ={"PYTHONPATH": "{site}/pile"}, fixed={"environ": {}},
         files={"pile/transformers-4.41.0.dist-info/METADATA": metadata("transformers", "4.41.0")}),
    Case("colab", "a pile of preinstalled packages (Colab, NGC images)", "they fight any pinned stack", "pins",
         "differ", remedy="bash scripts/setup_h100.sh", leads_to="cpu", versions=COLAB,
         files=at_start("import sys; sys.base_prefix = sys.prefix")),
)  # fmt: skip
CASES = (*PYTHON, *MACHINE, *VERSIONS, *BINARIES, *INSTALLATION)
