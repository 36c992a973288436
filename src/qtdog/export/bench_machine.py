"""The processor that latencies were measured on, and the memory of a process: what Linux tells of both."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
FEATURES += ("asimddp", "i8mm", "bf16", "sve")  # of ARM
CPUINFO = Path("/proc/cpuinfo")


def cpu_features(cpuinfo: str | None = None) -> tuple[str, ...]:
    """Return what the processor has of the instructions that inference profits from; () where Linux does not tell.

    Without `avx512_vnni`, `avx_vnni` or `asimddp`, products of eight-bit integers are added up in 16 bits, which can
    saturate.

    Args:
        cpuinfo: the text of /proc/cpuinfo; None to read it.

    Example:
        >>> cpu_features("flags : fpu sse avx2 fma avx512_vnni")
        ('avx2', 'fma', 'avx512_vnni')
    """
    if cpuinfo is None:
        cpuinfo = CPUINFO.read_text() if CPUINFO.is_file() else ""
    lines = (line.split(":", 1)[1] for line in cpuinfo.splitlines() if line.startswith(("flags", "Features")))
    known = set(next(lines, "").split())
    return tuple(feature for feature in FEATURES if feature in known)


def reset_peak_memory() -> int:
    """Begin to measure the peak of this process's resident memory anew, where Linux can, and return what it holds now.

    Returns:
        Resident bytes now, or the peak so far on other systems.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, ValueError):
        return peak_memory()


def peak_memory() -> int:
    """Return the largest resident memory of this process in bytes, since it was last reset.

    Example:
        >>> peak_memory() > 10_000_000
        True
    """
    try:
        return _status("VmHWM")
    except (OSError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field}")
