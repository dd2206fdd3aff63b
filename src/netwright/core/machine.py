"""What the figures were measured on."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import onnxruntime
import psutil
import torch

__all__ = ["instruction_sets", "machine"]

# Names of the flags in Linux's cpuinfo and macOS's sysctl, by the name that we use.
_ISA = {
    "avx2": {"avx2", "hw.optional.avx2_0"},
    "avx512": {"avx512f", "hw.optional.avx512f"},
    "vnni": {"avx512_vnni", "avx_vnni", "hw.optional.avx512vnni"},
    "amx": {"amx_int8", "amx_tile"},
    "neon": {"asimd", "hw.optional.neon", "hw.optional.advsimd"},
    "dotprod": {"asimddp", "hw.optional.arm.feat_dotprod"},
    "i8mm": {"i8mm", "hw.optional.arm.feat_i8mm"},
    "sve": {"sve"},
}


def machine() -> dict[str, Any]:
    """The machine and the libraries that a measurement depends on, as plain data.

    Returns:
        ``cpu`` (its name), ``cores`` (that this process may use), ``threads`` (torch's), ``torch``, ``onnxruntime``,
        ``python``, ``os`` (names and versions), ``isa`` (see :func:`instruction_sets`), ``memory_bytes``.

    Example:
        >>> machine()["cores"] >= 1
        True
    """
    return {
        "cpu": _cpu_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "isa": instruction_sets(),
        "memory_bytes": int(psutil.virtual_memory().total),
    }


def instruction_sets() -> list[str]:
    """Which of the vector instructions that matter for inference this processor has.

    Names are ``avx2``, ``avx512``, ``vnni``, ``amx`` on x86, ``neon``, ``dotprod``, ``i8mm``, ``sve`` on Arm. Without
    ``vnni`` (or ``amx``) an x86 machine adds products of uint8 and int8 in 16 bits, which can saturate.
    """
    flags = _flags()
    return [name for name, spellings in _ISA.items() if flags & spellings]


def _flags() -> set[str]:
    if platform.system() == "Darwin":
        flags = _sysctl_flags(_output("sysctl", "-a"))
    else:
        flags = _cpuinfo_flags(_text("/proc/cpuinfo"))
    return flags | ({"asimd"} if platform.machine().lower() in ("arm64", "aarch64") else set())


def _cpuinfo_flags(text: str) -> set[str]:
    """The words of the first line ``flags`` (x86) or ``Features`` (Arm)."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _sysctl_flags(text: str) -> set[str]:
    """Keys ``hw.optional...`` whose value is 1, in lower case."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip().lower() for key, _, value in pairs if key.startswith("hw.optional") and value.strip() == "1"}


def _cpu_name() -> str:
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string").strip() or platform.machine()
    for line in _text("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity
        return os.cpu_count() or 1


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
