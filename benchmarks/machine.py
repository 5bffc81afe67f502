"""A description of the machine, and the memory of this process."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "open_clip_torch")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """Resident memory of this process in bytes; None where the system does not report it.

    peak: the highest value so far. now: the current value. anonymous: the part of `now` that no file backs; the other
    pages belong to mapped files, so the system can drop them and read them again.
    """

    peak: int | None
    now: int | None = None
    anonymous: int | None = None


def memory() -> Memory:
    """Read the memory of this process from the system."""
    if _STATUS.is_file():
        # VmHWM rather than getrusage's ru_maxrss, which starts from the memory of the parent process.
        rows = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
        peak, now, anonymous = (int(rows[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS", "RssAnon"))
        return Memory(peak, now, anonymous)
    try:
        import resource
    except ImportError:  # Windows
        return Memory(None)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Memory(kilobytes if sys.platform == "darwin" else kilobytes * 1024)


def describe() -> dict[str, str | int | float]:
    """Processor, cores, memory (bytes), load average, system, and versions of Python and libraries."""
    facts: dict[str, str | int | float] = {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if hasattr(os, "getloadavg"):
        facts["load_average_5_minutes"] = os.getloadavg()[1]
    return {**facts, **{name: version(name) for name in LIBRARIES}}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
