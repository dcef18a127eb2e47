"""What this machine is, and the versions of what runs on it."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from punster import __version__

PACKAGES = (
    "torch", "transformers", "safetensors", "gguf", "datasets", "jsonargparse", "rich", "tensorboard", "matplotlib", "filelock",
    "pyyaml", "numpy", "peft", "trl",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """CPU, cores, memory, accelerator and versions, for summaries and cards."""
    import torch

    return {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory_gb": round(memory_bytes() / 1e9, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "capability": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version(), "system": platform.system(),
        "torch": torch.__version__, "punster": __version__,
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of the packages that matter, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def told(path: str) -> list[str]:
    """Lines of a file in which Linux tells about the machine; none on other systems."""
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def cpu_name() -> str:
    names = [line.partition(":")[2].strip() for line in told("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """What decides the speed of matrix products, as far as the system tells."""
    known = {"avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "bf16", "sve"}
    return sorted(known & {word for line in told("/proc/cpuinfo") for word in line.split()})


def available_bytes() -> int:
    """Memory that programs can still take (Linux), else all of it."""
    sizes = [int(line.split()[1]) * 1024 for line in told("/proc/meminfo") if line.startswith("MemAvailable")]
    return sizes[0] if sizes else memory_bytes()


def memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
