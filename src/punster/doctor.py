"""punster doctor: what a bug report needs, and what explains a slow or failing run."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from punster import __version__
from punster.machine import (
    PACKAGES,
    available_bytes,
    cpu_features,
    cpu_quota,
    fit_threads,
    installed_bytes,
    machine,
    versions,
)


def doctor() -> int:
    """Print the findings; exit code 1 if something will not work."""
    import torch

    from punster.config.shared import DEFAULT_MODEL
    from punster.disk import cache_folder, sha256_of
    from punster.model.kernels import compiled, in_halves
    from punster.model.load import BUILT_IN
    from punster.train.plan import measured_speed
    from punster.train.setup import pick_device, pick_dtype

    print(f"punster {__version__}, Python {platform.python_version()} on {platform.platform()}")
    fit_threads()
    installed, found = versions(), machine()
    for package in PACKAGES:
        print(f"  {package:13s} {installed.get(package, 'not installed')}")
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    print(f"machine        {found['cpu']}, {found['cores']} cores ({found['threads']} threads used)")
    print(f"CPU features   torch uses {found['capability']}; {', '.join(cpu_features()) or 'the system does not tell'}")
    free_memory = available_bytes()
    whole = installed_bytes() / 1e9
    limit = f" (the limit of this process; the machine has {whole:.1f})" if found["memory_gb"] < round(whole, 1) else ""
    print(f"memory         {found['memory_gb']} GB{limit}, {free_memory / 1e9:.1f} GB available")
    here = shutil.disk_usage(Path.cwd()).free
    print(f"disk           {here / 1e9:.0f} GB free in {Path.cwd()}")
    print(f"device         {device}; frozen weights default to {str(dtype).removeprefix('torch.')}")
    in_use = device == "cpu" and dtype == torch.bfloat16 and compiled() is not None
    how = f"in use, with products in {'bf16 and in 8 bits' if in_halves() else '16-bit whole numbers (AVX2), none in 8 bits'}"
    print(
        f"C kernels      {how if in_use else 'not used (they need AVX2 without AMX, bf16 weights, a C compiler, a cache, and PUNSTER_KERNELS not 0)'}"
    )
    speed = 2 * measured_speed(dtype, device, 5.0) / 1e9
    print(f"speed          {speed:.0f} GFLOP/s in matrix products of training size (5 seconds)")
    cache = cache_folder()
    place = next(p for p in (cache, *cache.absolute().parents) if os.path.exists(p))
    free = shutil.disk_usage(place).free
    kept = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) if os.path.isdir(cache) else 0
    writable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    print(f"cache          {cache} ({kept / 1e9:.2f} GB in it, {free / 1e9:.0f} GB free{'' if writable else ', NOT writable'})")
    model = BUILT_IN[DEFAULT_MODEL]
    path = cache / "models" / model.name / Path(model.member).name
    there = os.path.exists(path)
    damaged = there and sha256_of(path) != model.sha256
    if damaged:
        print(f"default model  {model.name}: damaged (wrong checksum); it will be fetched again on first use")
    elif there:
        print(f"default model  {model.name}: present, SHA-256 {model.sha256[:16]}… correct")
    else:
        print(f"default model  {model.name}: not fetched yet (it will be, on first use)")
    if torch.get_num_threads() < (os.cpu_count() or 1) and "OMP_NUM_THREADS" in os.environ:
        print(f"note           fewer threads than cores: OMP_NUM_THREADS is {os.environ['OMP_NUM_THREADS']}")
    if (quota := cpu_quota()) < (os.cpu_count() or 1):
        many = f", and OMP_NUM_THREADS asks for {found['threads']} threads: slow" if found["threads"] > max(1, quota) else ""
        print(f"note           this process may take the time of {quota:g} of {os.cpu_count()} cores{many}")
    if free_memory and free_memory < 3e9:
        print(
            "note           less than 3 GB of memory available: the demo needs about 3; close something, or use a smaller --scale"
        )
    if min(here, free) < 2e9:
        print("note           less than 2 GB of disk free")
    return 0 if writable and not damaged else 1
