"""What this machine is, and the versions of what runs on it."""

from __future__ import annotations

import math
import os
import platform
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
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
    """Lines of a file in which Linux tells about the machine; none on other systems, or where it is closed to us."""
    with suppress(OSError):
        return Path(path).read_text(errors="replace").splitlines()
    return []


def cpu_name() -> str:
    names = [line.partition(":")[2].strip() for line in told("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """What decides the speed of matrix products, as far as the system tells."""
    known = {"avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "bf16", "sve"}
    return sorted(known & {word for line in told("/proc/cpuinfo") for word in line.split()})


def available_bytes() -> int:
    """Memory that programs can still take (Linux), else all of it: of the machine, and of the container."""
    sizes: list[float] = [int(line.split()[1]) * 1024 for line in told("/proc/meminfo") if line.startswith("MemAvailable")]
    for group in control_groups("memory"):
        held = dict(line.split()[:2] for line in told(f"{group}/memory.stat"))
        kept = int(held.get("total_inactive_file", held.get("inactive_file", 0)))  # total: with groups inside, in version 1
        for limit, taken in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            used = number_in(f"{group}/{taken}") - kept  # copies of files make room when it is needed
            sizes.append(number_in(f"{group}/{limit}") - used)
    sizes = [size for size in sizes if math.isfinite(size)]
    return max(1, int(min(sizes))) if sizes else memory_bytes()


def installed_bytes() -> int:
    """Memory of the machine; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def memory_bytes() -> int:
    """All memory that this process may have: the machine's, or less in a container."""
    if not (whole := installed_bytes()):
        return 0
    names = ("memory.max", "memory.limit_in_bytes")
    return int(min([whole, *(number_in(f"{group}/{name}") for group in control_groups("memory") for name in names)]))


def cpu_quota() -> float:
    """Processors' worth of time that this process may take (`docker run --cpus 2`); infinite without a limit."""
    shares = []
    for group in control_groups("cpu"):
        shares += [(told(f"{group}/cpu.max") or [""])[0].split()]
        shares += [[str(line) for name in ("quota", "period") for line in told(f"{group}/cpu.cfs_{name}_us")]]
    return min((int(share[0]) / int(share[1]) for share in shares if len(share) == 2 and share[0].isdigit()), default=math.inf)


def control_groups(controller: str) -> list[str]:
    """Folders of the control groups that this process is in, the outermost first (Linux, version 2 or 1); limits of all of them hold."""
    found = []
    for controllers, path in (parts[1:] for line in told("/proc/self/cgroup") if len(parts := line.split(":", 2)) == 3):
        if not controllers or controller in controllers.split(","):
            root = PurePosixPath("/sys/fs/cgroup", controller if controllers else "")
            group = PurePosixPath(path.lstrip("/"))  # in some containers the host's name of it, with its own files at the root
            found += [str(root / part) for part in (*reversed(group.parents), group)]
    return list(dict.fromkeys(found))


def number_in(path: str) -> float:
    """The number in a file of one; infinite if there is none."""
    first = (told(path) or [""])[0]
    return int(first) if first.isdigit() else math.inf


@cache
def fit_threads() -> None:
    """Once in a process: no more threads, for all of it, than the quota has processors.

    torch counts the cores that it sees, and too many threads wait for each other until the limit's next period. OMP_NUM_THREADS
    is obeyed where it is set, and `torch.set_num_threads` after this.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ and (quota := cpu_quota()) < torch.get_num_threads():
        torch.set_num_threads(max(1, int(quota)))
