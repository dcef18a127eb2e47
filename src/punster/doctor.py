"""punster doctor: what a bug report needs, and what explains a slow or failing run."""

from __future__ import annotations

import os
import platform
import shutil
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


def doctor() -> int:
    """Print the findings; exit code 1 if something will not work."""
    import torch

    from punster.model.kernels import compiled
    from punster.model.load import BUILT_IN, DEFAULT_MODEL, cache_folder, sha256_of
    from punster.train.plan import measured_speed
    from punster.train.setup import fast_bf16, pick_device, pick_dtype

    print(f"punster {__version__}, Python {platform.python_version()} on {platform.platform()}")
    installed, found = versions(), machine()
    for package in PACKAGES:
        print(f"  {package:13s} {installed.get(package, 'not installed')}")
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    print(f"machine        {found['cpu']}, {found['cores']} cores ({found['threads']} threads used)")
    print(f"CPU features   torch uses {found['capability']}; {', '.join(cpu_features()) or 'the system does not tell'}")
    free_memory = available_bytes()
    print(f"memory         {found['memory_gb']} GB, {free_memory / 1e9:.1f} GB available")
    here = shutil.disk_usage(Path.cwd()).free
    print(f"disk           {here / 1e9:.0f} GB free in {Path.cwd()}")
    print(
        f"device         {device}; fast bf16: {'yes' if fast_bf16(device) else 'no'}; frozen weights default to {str(dtype).removeprefix('torch.')}"
    )
    in_use = device == "cpu" and dtype == torch.bfloat16 and compiled() is not None
    print(
        f"C kernels      {'in use' if in_use else 'not used (they need AVX512_BF16 without AMX, bf16 weights and a C compiler)'}"
    )
    speed = 2 * measured_speed(dtype, device, 5.0) / 1e9
    print(f"speed          {speed:.0f} GFLOP/s in matrix products of training size (5 seconds)")
    cache = cache_folder()
    free = shutil.disk_usage(cache if cache.exists() else Path.home()).free
    kept = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    writable = os.access(next(p for p in (cache, *cache.parents) if p.exists()), os.W_OK)
    print(f"cache          {cache} ({kept / 1e9:.2f} GB in it, {free / 1e9:.0f} GB free{'' if writable else ', NOT writable'})")
    model = BUILT_IN[DEFAULT_MODEL]
    path = cache / "models" / model.name / Path(model.member).name
    damaged = path.exists() and sha256_of(path) != model.sha256
    if damaged:
        print(f"default model  {model.name}: damaged (wrong checksum); it will be fetched again on first use")
    elif path.exists():
        print(f"default model  {model.name}: present, SHA-256 {model.sha256[:16]}… correct")
    else:
        print(f"default model  {model.name}: not fetched yet (it will be, on first use)")
    if torch.get_num_threads() < (os.cpu_count() or 1):
        print("note           fewer threads than cores: OMP_NUM_THREADS may be set")
    if free_memory and free_memory < 3e9:
        print(
            "note           less than 3 GB of memory available: the demo needs about 3; close something, or use --max-tokens 1024"
        )
    if min(here, free) < 2e9:
        print("note           less than 2 GB of disk free")
    return 0 if writable and not damaged else 1
