"""The GPUs that a process may use, and one of them for a command: nvidia-smi's facts, CUDA_VISIBLE_DEVICES' choice.

Only the standard library is imported here, so that a bare system Python can use it before anything is installed.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fasttune.errors import FasttuneError
from fasttune.hardware import VISIBLE, Gpu

# https://docs.nvidia.com/deploy/nvidia-smi/ (--help-query-gpu). The limits are watts.
QUERY = "name,compute_cap,memory.total,driver_version,uuid,mig.mode.current"
QUERY += ",power.default_limit,power.limit,enforced.power.limit"
SLICE = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (MIG-\S+)\)")


def read() -> tuple[list[list[Gpu]], str | None]:
    """Every card of this machine in nvidia-smi's order, as itself or as its slices; and the driver, if one answers."""
    cards, driver, sliced = parse(smi(f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"))
    return [slices(gpu) if gpu.card in sliced else [gpu] for gpu in cards], driver


def parse(answer: str) -> tuple[list[Gpu], str | None, set[str]]:
    """The CSV of QUERY, a line a card: cards, driver, and the cards that are cut into slices."""
    gpus, driver, sliced = list[Gpu](), None, set[str]()
    for line in answer.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != len(QUERY.split(",")) or not re.fullmatch(r"\d+\.\d+", fields[1]):
            continue  # a warning of nvidia-smi, or a driver too old to know compute_cap
        name, capability, memory_mib, driver, uuid, mig, default, *limits = fields
        major, minor = map(int, capability.split("."))
        memory_gib = (number(memory_mib) or 0.0) / 1024
        limit = min((watts for text in limits if (watts := number(text)) is not None), default=None)
        gpus.append(Gpu(name, (major, minor), memory_gib, uuid, uuid, limit, number(default)))
        sliced |= {uuid} if mig == "Enabled" else set()
    return gpus, driver, sliced


def slices(card: Gpu) -> list[Gpu]:
    """The slices of a card in MIG mode. Their ids stand in one answer of nvidia-smi, their memory in another."""
    from xml.etree import ElementTree

    try:
        devices = list(ElementTree.fromstring(smi("-q", "-x", "-i", card.card)).iter("mig_device"))
    except ElementTree.ParseError:
        devices = []
    memory_mib = {d.findtext("index"): (d.findtext("fb_memory_usage/total") or "").partition(" ")[0] for d in devices}
    found = []
    _, _, listed = smi("-L").partition(f"(UUID: {card.card})\n")
    for line in listed.partition("\nGPU ")[0].splitlines():
        if match := SLICE.match(line):
            profile, index, uuid = match.groups()
            nominal = re.search(r"(\d+)gb", profile)  # 1g.10gb: what it is sold as, a little more than it has
            gib = (number(memory_mib.get(index, "")) or 1024 * float(nominal[1] if nominal else 0)) / 1024
            found.append(replace(card, name=f"{card.name} MIG {profile}", memory_gib=gib, uuid=uuid))
    return found


def visible(cards: list[list[Gpu]], environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Those that CUDA shows a process: all, or the listed ones up to the first that is none of them.

    A number is nvidia-smi's, of which CUDA's own may differ where the cards do; of a card in slices it is the first.
    """
    listed = environment.get(VISIBLE)
    everything = [gpu for card in cards for gpu in card]
    if listed is None:
        return everything
    found: list[Gpu] = []
    for entry in map(str.strip, listed.split(",")):
        if entry.isdecimal():
            named = cards[int(entry)][:1] if int(entry) < len(cards) else []
        elif entry.startswith("MIG-"):  # of any id the beginning is enough
            named = [gpu for gpu in everything if gpu.uuid.startswith(entry)]
        else:
            named = [card[0] for card in cards if card and entry[:4] == "GPU-" and card[0].card.startswith(entry)]
        if len(named) != 1:
            break
        found += named
    return found


def pin() -> None:
    """Show this process and those it starts one GPU only, by its id; before torch looks for GPUs.

    With several, plain trainers would give each a batch of its own (DataParallel). A rank of torchrun takes its own.
    Raises FasttuneError where CUDA_VISIBLE_DEVICES names none: nobody wants a long run on the CPU by mistake.
    """
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    cards, _ = read()
    gpus, listed = visible(cards), os.environ.get(VISIBLE, "").strip()
    if cards and not gpus and listed and not re.match("-|NoDevFiles", listed):  # the two common words for none
        raise FasttuneError(
            f"{VISIBLE}={listed}: names no GPU of this machine: unset {VISIBLE}, or give a number below {len(cards)} "
            "or an id that `nvidia-smi -L` shows (empty: the CPU)"
        )
    if gpus and rank >= len(gpus):
        raise FasttuneError(
            f"process {rank + 1} of this machine has no GPU, only {len(gpus)} can be used: start as many"
        )
    if gpus and gpus[rank].uuid:
        os.environ[VISIBLE] = gpus[rank].uuid
    if len(gpus) > 1 and "LOCAL_RANK" not in os.environ:
        told = f"takes one GPU, the first of {len(gpus)} that it may use: {gpus[0].name} ({gpus[0].uuid})"
        print(f"fasttune: {told}; {VISIBLE} chooses another", file=sys.stderr)


def count(asked: str) -> int:
    """How many processes `--gpus` means. Raises FasttuneError."""
    cards, _ = read()
    usable = len(visible(cards))
    if asked == "all":
        if not usable:
            raise FasttuneError("--gpus all: no GPU here; give a number to try it in so many processes on the CPU")
        return usable
    if not asked.isdecimal() or not int(asked):
        raise FasttuneError(f"--gpus {asked}: a whole number from 1, or all")
    if usable and int(asked) > usable:
        raise FasttuneError(f"--gpus {asked}: this machine has {usable} to use")
    return int(asked)


def capped(gpu: Gpu) -> str | None:
    """In words, that the owner of a card has lowered its power limit."""
    limit, default = gpu.power_limit_w, gpu.default_power_limit_w
    if limit is None or default is None or limit >= default:
        return None
    return f"power cap {limit:.0f} W of {default:.0f} W: slower than a full card"


def nvidia_smi_error() -> str:
    """Why there is no GPU: what nvidia-smi says, in one line; empty where there is no nvidia-smi or it sees one."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return " ".join((done.stdout + done.stderr).split()) if done.returncode or "GPU " not in done.stdout else ""


def triton_lacks() -> tuple[str, str] | None:
    """What Triton does not find when it compiles its launcher, at the first step on a GPU, and what installs it.

    Source: triton/runtime/build.py (3.6.0)
    """
    header = Path(sysconfig.get_paths("posix_prefix")["include"]) / "Python.h"
    missing = {}
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing["gcc"] = "a C compiler"
    if not header.is_file():
        missing["python{}.{}-dev".format(*sys.version_info)] = f"Python's headers ({header})"
    return (" and ".join(missing.values()), f"apt-get install -y {' '.join(missing)}") if missing else None


def smi(*arguments: str) -> str:
    """What nvidia-smi answers; nothing where there is none, or it fails."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


@contextmanager
def every_second(card: str, names: Sequence[str]) -> Iterator[Callable[[], list[list[str]]]]:
    """Asks nvidia-smi for these values of a card once a second, meanwhile; called, it gives those seen so far.

    None are where there is no nvidia-smi.
    """
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--loop=1", "-i", card]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        try:
            watch = subprocess.Popen(query, stdout=said, stderr=subprocess.DEVNULL)
        except OSError:
            yield list
            return

        def seen() -> list[list[str]]:
            said.seek(0)
            rows = [[value.strip() for value in line.split(",")] for line in said]
            return [row for row in rows if len(row) == len(names)]

        try:
            yield seen
        finally:
            watch.terminate()
            watch.wait()


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None
