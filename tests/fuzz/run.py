"""Foreign configs and data, many of them, through the real commands:  python tests/fuzz/run.py --cases 100 --first 0

Each case runs in a forked child under the kernel's limits. What must hold of every one: exit 0 or 2 (or 1 of train, and
of a plan that does not fit), an error that is short lines of ours and no traceback, nothing written outside the output
folder and the cache, and every file that was there as it was. A failure is printed with its seed and its input.
"""

import argparse
import gc
import os
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path

SCRATCH = tempfile.TemporaryDirectory(prefix="fasttune-fuzz-")
os.environ |= {"FASTTUNE_CACHE": f"{SCRATCH.name}/cache", "HF_HOME": f"{SCRATCH.name}/hf", "HF_HUB_OFFLINE": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLCONFIGDIR": f"{SCRATCH.name}/matplotlib"}
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cases  # noqa: E402

CPU_S, MEMORY_BYTES = 20, 2 << 30
HANGS_S = 300  # of a child that waits for something: the kernel's alarm ends it


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--cases", type=int, default=100)
    options.add_argument("--first", type=int, default=0, metavar="SEED", help="the seeds go up from it")
    options.add_argument("--show", action="store_true", help="a line for every case: its exit and what it said last")
    given = options.parse_args()
    # Imported once, for all children.
    import datasets  # noqa: F401
    import matplotlib.font_manager  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import fasttune.cli
    import fasttune.core.train
    import fasttune.core.trainer
    import fasttune.tools.inspect_data
    import fasttune.tools.plan  # noqa: F401

    gc.freeze()  # what is imported is no garbage: no child looks through it
    warm = cases.Case(["plan", "c.yaml"], {"c.yaml": b"model: {name: builtin:tiny}\ndata: {train: builtin:arithmetic}"})
    faults = {"the cache is filled": found} if (found := run(warm, given.show)) else {}
    for seed in range(given.first, given.first + given.cases):
        case = cases.make(seed)
        if found := run(case, given.show, seed):
            faults[f"--first {seed} --cases 1"] = found
            print(
                f"\n{'=' * 100}\npython tests/fuzz/run.py --first {seed} --cases 1\nfasttune {case.arguments!r:.2000}"
            )
            for name, content in case.files.items():
                print(f"{name}: {content!r:.2000}")
            print(found, flush=True)
    print(f"{len(faults)} of {given.cases} cases failed{': ' if faults else ''}{'; '.join(faults)}")
    return 1 if faults else 0


def run(case: cases.Case, show: bool, seed: int | None = None) -> str:
    """What is wrong with how a case ended; nothing if all is well."""
    with tempfile.TemporaryDirectory(dir=SCRATCH.name) as scratch:
        folder, said = Path(scratch) / "here", Path(scratch) / "said"
        for name in ("here", "said", "home", "tmp"):
            (Path(scratch) / name).mkdir()
        for name, content in case.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _child(case, Path(scratch))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out, err = ((said / name).read_text("utf-8", "replace") for name in ("out", "err"))
        wrong = [*_of_words(case, status, out, err), *_of_files(case, Path(scratch))]
    if show:
        print(seed, *case.arguments[:1], status, (err.splitlines() or [""])[-1][:200], flush=True)
    return "\n".join([*wrong, f"exit {status}; stderr:", err[-3000:]]) if wrong else ""


def _child(case: cases.Case, scratch: Path) -> None:
    code = 70
    try:
        os.chdir(scratch / "here")
        os.environ |= {"HOME": str(scratch / "home"), "TMPDIR": str(scratch / "tmp")}
        tempfile.tempdir = None
        for number, name in ((0, "/dev/null"), (1, scratch / "said" / "out"), (2, scratch / "said" / "err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES,) * 2)
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(HANGS_S)
        code = sys.modules["fasttune.cli"].main(case.arguments)
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 71
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _of_words(case: cases.Case, status: int, out: str, err: str) -> list[str]:
    command, wrong = case.arguments[0], []
    fine = {0, 2} | ({1} if command == "train" or "does not fit" in err else set())
    if status not in fine:
        wrong.append(f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit {status}")
    if "Traceback" in err:
        wrong.append("a traceback")
    if status == 2:
        lines = err.splitlines()
        ours = [line for line in lines if line.startswith("fasttune")]
        if not ours or lines[-len(ours) :] != ours or out:
            wrong.append("the error is not the last that is said")
        if any(len(line) > 300 for line in ours):
            wrong.append("a line of over 300 characters")
    return wrong


def _of_files(case: cases.Case, scratch: Path) -> list[str]:
    left = {str(path.relative_to(scratch)): path for path in scratch.rglob("*") if not path.is_dir()}
    own = {f"here/{name}": content for name, content in case.files.items()}
    lost = [name for name, content in own.items() if name not in left or left[name].read_bytes() != content]
    may = ("said/", "here/out/") if case.arguments[0] == "train" else ("said/",)
    new = [name for name in left if name not in own and not name.startswith(may)]
    return [f"changed or gone: {name}" for name in lost] + [f"written: {name}" for name in new]


if __name__ == "__main__":
    sys.exit(main())
