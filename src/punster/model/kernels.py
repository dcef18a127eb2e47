"""The kernels of csrc: built once by the system's C compiler, kept in the cache folder, left out where something is missing.

They serve CPUs with AVX512_BF16 and AVX512_VNNI (and without AMX, for which PyTorch's own products are better), and with AVX2, where
bf16 products run in 16-bit whole numbers: bf16 weights, and in fp32 the choice of tokens and the attention of scoring. Everything has a
plain path in PyTorch beside it; PUNSTER_KERNELS=0 chooses that one, and =avx2 what AVX2 can. n rows, R ranks of all low-rank updates of a product together.
"""

from __future__ import annotations

import ctypes as c
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from punster.errors import UserError

if TYPE_CHECKING:
    from punster.model.lora import Adapter

LONGEST = 192  # tokens of a path up to which every query is attended alone, as in decoding; in blocks beyond
SIDE = 64  # queries, and keys, of a block
BLOCK = 256  # inputs of a row that are rounded to 8 bits together; as in csrc/quantised.h
RUN = 64  # the same, to 16-bit whole numbers; as in csrc/whole.h
PANEL = 48  # columns of packed weights that lie together
STORE, ADD, STORE_BF16 = 0, 1, 2
SILU, GELU_TANH = 0, 1
ACTIVATIONS = {("llama", "silu"): SILU, ("gpt2", "gelu_new"): GELU_TANH}
Site = tuple[str, slice]  # a linear layer and its columns of the joint output


class CUpdate(c.Structure):
    _fields_ = (("a", c.c_void_p), ("b", c.c_void_p), ("ranks", c.c_int32), ("begin", c.c_void_p), ("end", c.c_void_p))


class CProduct(c.Structure):
    _fields_ = (("w", c.c_void_p), ("bias", c.c_void_p), ("into", c.c_int32), ("out", c.c_int32), ("update", CUpdate))


class CQuantised(c.Structure):
    _fields_ = (("product", CProduct), ("scale", c.c_void_p), ("shift", c.c_void_p))


class CNorm(c.Structure):
    _fields_ = (("weight", c.c_void_p), ("bias", c.c_void_p), ("eps", c.c_float))


class CLayer(c.Structure):
    _fields_ = (
        ("before", CNorm), ("between", CNorm), ("attend", CProduct), ("out", CProduct), ("up", CProduct), ("down", CProduct),
    )  # fmt: skip


class CKept(c.Structure):
    _fields_ = tuple(
        (name, c.c_void_p)
        for name in (  # in the order in which fused.attention and fused.feed_forward save them
            "x", "normed", "low", "stat", "qkv", "log_total", "found", "low_found",
            "between", "normed_between", "low_up", "stat_between", "wide", "act", "low_down",
        )
    )  # fmt: skip


class CDecode(c.Structure):
    _fields_ = (
        *((name, c.c_int32) for name in ("d", "heads", "kv_heads", "size", "width", "act", "capacity")),
        ("rows", c.c_int64), ("length", c.c_int64), ("start", c.c_void_p), ("cos", c.c_void_p), ("sin", c.c_void_p),
        ("keys", c.c_void_p), ("values", c.c_void_p),
        *((name, c.c_void_p) for name in ("x", "qkv", "out", "low", "narrow", "wide", "room", "kept")), ("offset", c.c_int64),
    )  # fmt: skip


class CTree(c.Structure):
    _fields_ = (
        *((name, c.c_int32) for name in ("heads", "kv_heads", "size")), ("count", c.c_int64),
        *((name, c.c_void_p) for name in ("nodes", "first", "position")),
    )  # fmt: skip


class CRuns(c.Structure):
    _fields_ = (
        *((name, c.c_int32) for name in ("heads", "kv_heads", "size")), ("runs", c.c_int64), ("padded", c.c_int64),
        *((name, c.c_void_p) for name in ("nodes", "start", "from", "end", "at")),
    )  # fmt: skip


NO_UPDATE = CUpdate(None, None, 0, None, None)


@cache
def compiled() -> c.CDLL | None:
    """The compiled kernels, or None where they cannot help."""
    if (kind := os.environ.get("PUNSTER_KERNELS", "")) not in ("", "0", "1", "avx2"):
        raise UserError(f"PUNSTER_KERNELS is {kind!r}; it must be 0 (none), avx2, or not set")
    if kind == "0":
        return None
    from punster.machine import cpu_features

    features, compiler = cpu_features(), shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    if not {"avx2", "fma"} <= set(features) or "amx_bf16" in features or compiler is None:
        return None
    try:
        found = opened(compiler)
        if right(found):
            keep_memory()
            return found
        reason = "they multiply wrongly"
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        reason = getattr(error, "stderr", None) or str(error)
    warnings.warn(f"the C kernels could not be used ({reason.strip()[:300]}); plain PyTorch takes their place", stacklevel=2)
    return None


def opened(compiler: str) -> c.CDLL:
    """The library, built anew where what is in the cache is none: cut off by a power cut, say."""
    path = build(compiler)
    head = path.read_bytes()[:64]  # the table of sections is an ELF file's end; to map what was cut off is a bus error
    if path.stat().st_size < int.from_bytes(head[40:48], "little") + 64 * int.from_bytes(head[60:62], "little"):
        path.unlink()
        path = build(compiler)
    try:
        return c.CDLL(str(path))
    except OSError as error:
        if "failed to map" in str(error):  # a folder that nothing may be run from: no other file would do
            raise
        path.unlink(missing_ok=True)
        return c.CDLL(str(build(compiler)))


def in_halves() -> bool:
    """Whether the kernels multiply bf16 as such, and bytes at twice that speed; else (AVX2) in 16-bit whole numbers, and bytes no faster."""
    found = compiled()
    return found is not None and bool(found.punster_in_halves())


def build(compiler: str) -> Path:
    """Compile once for this source, compiler and machine; linked with PyTorch's own OpenMP, so that one pool of threads serves both."""
    from punster.disk import cache_folder, flush

    source = Path(__file__).with_name("csrc") / "kernels.c"
    text = "".join(path.read_text() for path in sorted(source.parent.glob("*.[ch]")))
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    command = [compiler, "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared", str(source)]
    command += [*map(str, openmp[:1]), "-lm", *(["-DONLY_AVX2"] if os.environ.get("PUNSTER_KERNELS") == "avx2" else [])]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    cpu = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]
    name = hashlib.sha256("\0".join((text, *command, version, cpu)).encode()).hexdigest()[:20]
    target = cache_folder() / "kernels" / f"{name}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fresh = Path(folder) / "kernels.so"
            subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True, check=True, timeout=120)
            flush(fresh)
            fresh.replace(target)
    return target


def keep_memory() -> None:
    """Let the C library keep freed memory (glibc): fresh pages for every block's activations cost a twentieth of the time."""
    with suppress(AttributeError, OSError):
        tune = c.CDLL(None).mallopt
        for parameter, size in ((-3, 32 << 20), (-1, 2**31 - 1), (-2, 128 << 20)):  # mmap threshold, trim threshold, top pad
            tune(parameter, size)


def right(found: c.CDLL) -> bool:
    weight, x = torch.linspace(-1, 1, 50 * 32).view(50, 32).bfloat16(), torch.linspace(-1, 1, 9 * 32).view(9, 32).bfloat16()
    packed, y = torch.zeros(packed_size(50, 32), dtype=torch.int32), torch.empty(9, 50)
    found.punster_pack(at(weight), 50, 32, c.c_long(32), c.c_long(1), at(packed))
    halves, room = bool(found.punster_in_halves()), torch.empty(room_size(9, 32), dtype=torch.int16)
    product = CProduct(at(packed), None, 32, 50, NO_UPDATE)
    found.punster_product(at(x), c.c_long(9), c.byref(product), at(room), None, None, at(y), STORE)
    of_products = torch.allclose(y, x.float() @ weight.float().T, atol=1e-4 if halves else 0.01)
    ends, pairs, outer = torch.tensor([[0], [32]], dtype=torch.int32), torch.empty(5, dtype=torch.int32), torch.empty(1, 32)
    low = torch.arange(9.0).view(9, 1)
    found.punster_outer(at(low), at(x), c.c_long(9), 32, 1, at(ends[0]), at(ends[1]), at(pairs), at(outer))
    return of_products and torch.allclose(outer, low.T @ x.float(), atol=1e-4) and (not halves or right_in_bytes(found))


def right_in_bytes(found: c.CDLL) -> bool:
    whole, z = torch.arange(9 * 32).view(9, 32) * 7 % 255 - 127, torch.empty(9, PANEL)  # whole numbers of which none is lost
    whole[:, 0] = 127
    bytes_of, packed, shift = (
        whole.to(torch.int8).repeat(6, 1)[:PANEL],
        torch.zeros(PANEL * 8, dtype=torch.int32),
        torch.zeros(PANEL, dtype=torch.int32),
    )
    found.punster_pack_bytes(at(bytes_of), PANEL, 32, at(packed), at(shift))
    rows, room, size, scale = whole.bfloat16(), torch.empty(9, 32, dtype=torch.uint8), torch.empty(9), torch.ones(PANEL)
    product = CQuantised(CProduct(at(packed), None, 32, PANEL, NO_UPDATE), at(scale), at(shift))
    found.punster_product_of_bytes(at(rows), c.c_long(9), c.byref(product), at(room), at(size), None, None, at(z), STORE)
    return torch.allclose(z, whole.float() @ bytes_of.float().T, rtol=1e-5)


def packed_size(out: int, into: int) -> int:
    """In units of 4 bytes: whole panels of pairs, and room for a scale of each column."""
    return -(-out // PANEL) * PANEL * (into // 2 + 1)


def room_size(rows: int, into: int) -> int:
    """In units of 2 bytes: a block of rows as whole numbers, and the size of a unit in every RUN inputs, as csrc/whole.h wants it."""
    return rows * (into + 2 * -(-into // RUN))


def room_for(rows: int, into: int) -> Tensor | None:
    """What products in whole numbers work in; those of bf16 need none."""
    return None if in_halves() else torch.empty(room_size(rows, into), dtype=torch.int16)


def at(tensor: Tensor | None) -> c.c_void_p | None:
    return None if tensor is None else c.c_void_p(tensor.data_ptr())


def call(name: str, *arguments: Any) -> None:
    """Integers are passed as long or int by the C prototype's order; tensors by address."""
    found = compiled()
    assert found is not None
    getattr(found, name)(*(at(x) if isinstance(x, Tensor) else x for x in arguments))


def suits(weight: Tensor) -> bool:
    """Whether a frozen matrix (out, in) can be packed."""
    fits = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.shape[1] % 32 == 0
    return fits and not weight.requires_grad and compiled() is not None


@dataclass
class Packed:
    """A frozen matrix (out, in) in the order the kernels read it."""

    weight: Tensor
    bias: Tensor | None  # (out,) fp32
    into: int
    out: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Packed:
        """(out, in) bf16, of any strides: a transposed view serves the product with the transpose."""
        out, into = weight.shape
        packed = torch.empty(packed_size(out, into), dtype=torch.int32)
        call("punster_pack", weight, out, into, c.c_long(weight.stride(0)), c.c_long(weight.stride(1)), packed)
        return cls(packed, None if bias is None else bias.detach().float().contiguous(), into, out)

    def product(self, update: CUpdate = NO_UPDATE) -> CProduct:
        return CProduct(at(self.weight), at(self.bias), self.into, self.out, update)

    def __call__(self, x: Tensor, low: Tensor | None = None, update: CUpdate = NO_UPDATE, base: Tensor | None = None,
                 half: bool = False) -> Tensor:  # fmt: skip
        """x (n, in) bf16 -> x W^T + bias + low b, (n, out) fp32, or bf16 if half; `base` (n, out) and that where it is given."""
        x = x.contiguous()
        assert base is None or not half
        y = torch.empty(len(x), self.out, dtype=torch.bfloat16 if half else torch.float32)
        mode = ADD if base is not None else STORE_BF16 if half else STORE
        call("punster_product", x, c.c_long(len(x)), c.byref(self.product(update)), room_for(*x.shape), low, base, y, mode)
        return y


@dataclass
class Quantised:
    """A frozen matrix (out, in) in 8 bits, for rows that are rounded to 8 bits on the way in: twice the speed of bf16.

    As in SwitchBack (Wortsman et al. 2023, arXiv:2304.13013), but with a scale for every 256 inputs of a row and for every output.
    """

    weight: Tensor
    scale: Tensor  # (padded out,) fp32: what a unit of the column is worth
    shift: Tensor  # (blocks, padded out) int32
    bias: Tensor | None  # (out,) fp32
    into: int
    out: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Quantised:
        """(out, in) of any strides: a transposed view serves the product with the transpose."""
        out, into = weight.shape
        wide, blocks = -(-out // PANEL) * PANEL, -(-into // BLOCK)
        scale = torch.ones(wide)
        scale[:out] = weight.abs().amax(1).float().clamp(min=1e-30) / 127
        whole = torch.zeros(wide, into, dtype=torch.int8)
        whole[:out] = (weight.float() / scale[:out, None]).round().to(torch.int8)
        packed, shift = torch.empty(wide * into // 4, dtype=torch.int32), torch.empty(blocks, wide, dtype=torch.int32)
        call("punster_pack_bytes", whole, wide, into, packed, shift)
        return cls(packed, scale, shift, None if bias is None else bias.detach().float().contiguous(), into, out)

    def __call__(self, x: Tensor, low: Tensor | None = None, update: CUpdate = NO_UPDATE, base: Tensor | None = None,
                 half: bool = False) -> Tensor:  # fmt: skip
        """As `Packed`."""
        x = x.contiguous()
        y = torch.empty(len(x), self.out, dtype=torch.bfloat16 if half else torch.float32)
        rounded_rows, size = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), -(-self.into // BLOCK))
        mode = ADD if base is not None else STORE_BF16 if half else STORE
        product = CQuantised(
            CProduct(at(self.weight), at(self.bias), self.into, self.out, update), at(self.scale), at(self.shift)
        )
        call("punster_product_of_bytes", x, c.c_long(len(x)), c.byref(product), rounded_rows, size, low, base, y, mode)
        return y


@dataclass
class LowRank:
    """All low-rank updates of one product: y += (x a^T) b, a (R, in), b (R, out) scaled and zero outside each rank's columns."""

    parts: list[tuple[slice, slice, Adapter, str]] = field(default_factory=list)  # ranks, columns, whose, where
    a: Tensor | None = None
    b: Tensor | None = None
    ends: Tensor | None = None  # (4, R): where columns of the output begin and end, then the same of trained ranks only

    @classmethod
    def of(cls, places: Sequence[Site], adapters: Sequence[Adapter]) -> LowRank:
        found = [(columns, adapter, site) for site, columns in places for adapter in adapters if site in adapter.a]
        if not found:
            return cls()
        ranks = sum(adapter.rank for _, adapter, _ in found)
        device = found[0][1].a[found[0][2]].device
        b, ends, parts, rank = torch.zeros(ranks, places[-1][1].stop, device=device), [], [], 0
        for columns, adapter, site in found:
            own = slice(rank, rank := rank + adapter.rank)
            torch.mul(adapter.b[site].detach().T, adapter.scale, out=b[own, columns])
            trained = adapter.a[site].requires_grad
            row = (columns.start, columns.stop, *((columns.start, columns.stop) if trained else (0, 0)))
            ends += [row] * adapter.rank
            parts.append((own, columns, adapter, site))
        a = torch.cat([adapter.a[site].detach() for _, adapter, site in found])
        return cls(parts, a, b, torch.tensor(ends, dtype=torch.int32).T.contiguous())

    @property
    def ranks(self) -> int:
        return 0 if self.a is None else len(self.a)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y (n, out) += (x a^T) b, without the kernels."""
        return y if self.a is None or self.b is None else y.addmm_(x @ self.a.T, self.b)

    def forward(self) -> CUpdate:
        if self.a is None or self.ends is None:
            return NO_UPDATE
        return CUpdate(at(self.a), at(self.b), self.ranks, at(self.ends[0]), at(self.ends[1]))

    def backward(self) -> tuple[CUpdate, Tensor | None]:
        """The update of the product with the transpose, dx += pulled a, and what it must keep alive."""
        if self.a is None:
            return NO_UPDATE, None
        width = self.a.shape[1]
        ends = torch.tensor([[0] * self.ranks, [width] * self.ranks], dtype=torch.int32)
        return CUpdate(None, at(self.a), self.ranks, at(ends[0]), at(ends[1])), ends

    def gradients(self, low: Tensor, dy: Tensor, pulled: Tensor, x: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Of A and B of each part, in turn. low (n, R) = x a^T, dy (n, out), pulled (n, R) = dy b^T, x (n, in).

        dy and x are bf16; low and pulled are rounded to it, and the sums over the rows are fp32.
        """
        if self.ends is None or not any(wanted):
            return [None] * len(wanted)
        assert low.shape == pulled.shape == (len(x), self.ranks)
        of_b, of_a = torch.empty(self.ranks, dy.shape[1]), torch.empty(self.ranks, x.shape[1])
        ends = self.ends.clone()
        ends[0], ends[1] = 0, (ends[3] > 0) * x.shape[1]
        rows, pairs = c.c_long(len(x)), torch.empty(-(-len(x) // 2), self.ranks, dtype=torch.int32)
        call("punster_outer", low, dy, rows, dy.shape[1], self.ranks, self.ends[2], self.ends[3], pairs, of_b)
        call("punster_outer", pulled, x, rows, x.shape[1], self.ranks, ends[0], ends[1], pairs, of_a)
        grads: list[Tensor | None] = []
        for ranks, columns, adapter, _ in self.parts:
            trained = wanted[len(grads)]
            grads += [of_a[ranks], of_b[ranks, columns].T * adapter.scale] if trained else [None, None]
        return grads


def empty_low(rows: int, update: LowRank) -> Tensor:
    return torch.empty(rows, max(1, update.ranks))


def rounded(x: Tensor, update: CUpdate, ends: Tensor | None, low: Tensor) -> Tensor:
    """(n, in) fp32 -> bf16, and low = x a^T of the update."""
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    begin, end = (None, None) if ends is None else (ends[0], ends[1])
    call("punster_round", x, c.c_long(len(x)), x.shape[1], c.byref(update), begin, end, y, low)
    return y
