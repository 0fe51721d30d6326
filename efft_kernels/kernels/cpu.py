"""C++ kernels of csrc/cpu: one pass over x, W packed once, p kept in cache; AVX2, AVX-512, NEON, threads from torch.

The kernels read W as panels. For the forward, those of a weight that does not require grad are made at the first call
and kept: a copy as large as the weight, or as what autocast makes of it (twice as large for float16, which is widened).
A backward makes its own, a piece at a time in the cache, which costs little where many rows read it; for a few rows a
second copy is kept.
``packed_bytes()`` says how much is held, ``keep_packed(False)`` packs at every call instead, and freeing or changing
the weight frees its copies. Changes are seen by autograd's version counter. Writes that bypass it (``weight.data``,
``weight.numpy()``) are detected by a sample of every row and every column; code that writes single values that way
needs ``keep_packed(False)``.
"""

import functools
import weakref
from pathlib import Path

import torch
from torch import Tensor

from . import FLOATS, build, cpu_rules, decisions
from .memory import check_memory
from .tuning import table

_PACKAGE = Path(__file__).resolve().parents[1]
OVERWRITES_X = True  # see kernels.overwriting


def _library() -> Path:
    """What setup.py built, if it is of the sources that are here; else csrc/cpu is compiled into the user's cache.

    The latter is for installs that ran before torch was there, and for a checkout whose csrc/cpu has changed.
    """
    library = next(_PACKAGE.glob("_cpu*.so"), None)
    if library and build.belongs(library, "cpu"):
        return library
    return build.compile_library("cpu", "the CPU kernels")


@functools.cache
def sources() -> str:
    """The digest of the sources that the library is made from."""
    folder = build.csrc()
    return build.digest(folder / "cpu") if folder else build.carried(_library()) or "none"


table.SOURCES["cpu"] = sources


@functools.cache
def _load():
    """(the library's operators, None), or (None, why it cannot be loaded)"""
    try:
        torch.ops.load_library(str(_library()))
    except Exception as error:
        return None, f"the C++ kernels could not be loaded: {error}"
    if (wanted := table.recorded_isa()) in torch.ops.efft_cpu.isas().split():
        torch.ops.efft_cpu.set_isa(wanted)
    return torch.ops.efft_cpu, None


def unavailable() -> str | None:
    return _load()[1]


def unsupported(op: str, *tensors: Tensor | None) -> str | None:
    for t in tensors[:-1] if op.startswith("mixed") else tensors:  # all but the ids
        if t is not None and not (t.is_cpu and t.dtype in FLOATS and t.layout == torch.strided):
            return f"it takes strided float tensors on the CPU, got {t.dtype} {t.layout} on {t.device}"
    return None


def unproven(device: torch.device) -> str | None:
    return None


def slower(op: str, *tensors: Tensor | None, needs: list[bool] | None = None) -> str | None:
    """As measured by the tuner on this processor if that is on record, else by rules (cpu_rules.py)."""
    if table.recorded_isa() == isa() and table.on_record(op, tensors, needs):
        return table.slower("cpu", op, tensors, needs)
    rules = cpu_rules.of(isa())
    return rules if isinstance(rules, str) else rules(op, needs, *tensors)


@functools.cache
def isa() -> str:
    """The instruction set in use: avx512_bf16, avx512, avx2, neon_bf16, neon or portable."""
    return _load()[0].isa()


def isas() -> list[str]:
    """The instruction sets this processor can run, the one that is used first."""
    return _load()[0].isas().split()


def set_isa(name: str) -> None:
    """Use one of :func:`isas`, for tests. Not while another thread computes."""
    _load()[0].set_isa(name)
    isa.cache_clear()
    decisions.clear()
    clear_packed()


# id(weight) -> (weak reference, what the panels were made from, {transposed: panels}). There is no lock: threads, and
# weights that are freed at any moment, may remove each other's entries, which only costs packing again. Each operation
# on a dict is atomic, and each entry is checked before use
_packed = {}
_keep = True
# rows of dy from which on a backward packs by itself, by isa: with fewer, packing would be a large part of it. AVX-512
# computes faster, but packs no faster, so it takes more rows; that number is not measured
_MANY_ROWS = {"avx512_bf16": 256, "avx512": 256}
_MANY_ROWS_ELSEWHERE = 128


def keep_packed(keep: bool) -> None:
    """Whether panels of frozen weights are kept between calls (the default) or made at every call."""
    global _keep
    _keep = keep
    clear_packed()


def clear_packed() -> None:
    _packed.clear()


def packed_bytes() -> int:
    """Memory held by the panels of all weights."""
    return sum(panels.nbytes for _, _, made in _packed.copy().values() for panels in made.copy().values())


def _forget(key: int, reference) -> None:
    entry = _packed.get(key)
    if entry and entry[0] is reference:
        _packed.pop(key, None)


def _keeps(weight: Tensor) -> bool:
    # an inference tensor has no version counter that would show a write
    return _keep and not weight.requires_grad and not weight.is_inference()


def _of_backward(weight: Tensor, rows: int) -> Tensor:
    """The panels of a weight for the backward, or the weight itself, whose panels the kernel then makes"""
    # what autocast has cast, maybe before the parameter changed: no panels to be kept as those of the parameter. the
    # backward has cast it, which costs as much as packing it
    if hasattr(weight, "efft_cast_of"):
        return weight if weight.stride(1) == 1 else _load()[0].pack(weight, True)
    few = rows < _MANY_ROWS.get(isa(), _MANY_ROWS_ELSEWHERE)
    return _panels(weight, True) if weight.stride(1) != 1 or (few and _keeps(weight)) else weight


def _panels(weight: Tensor, transposed: bool) -> Tensor:
    """weight [N, K] as panels of weight.T, for the forward, or of weight itself, for the backward"""
    ops = _load()[0]
    # panels of what autocast has cast belong to the parameter: the cast is gone after the call
    owner = weight if type(weight) is torch.nn.Parameter else getattr(weight, "efft_cast_of", weight)
    if not _keeps(owner):
        return ops.pack(weight, transposed)
    place = owner.data_ptr(), owner.shape, owner.stride(), owner.dtype
    state = *place, owner._version, ops.fingerprint(owner), weight.dtype
    key = id(owner)
    entry = _packed.get(key)
    if not (entry and entry[0]() is owner and entry[1] == state):
        entry = _packed[key] = weakref.ref(owner, functools.partial(_forget, key)), state, {}
    panels = entry[2].get(transposed)
    if panels is None:
        panels = entry[2][transposed] = ops.pack(weight, transposed)
    return panels


def group_update(sigma, v, scale):
    """up[s] = scale * sigma[s] @ v"""
    return _load()[0].group_update(sigma, v, scale).transpose(0, 1)


def group_update_backward(dup, sigma, v, scale, needs):
    """dsigma[s] = scale * dup[s] @ v.T;  dv = sum_s scale * sigma[s].T @ dup[s]"""
    return _load()[0].group_update_backward(dup, sigma, v, scale, *needs)


def lowrank_linear(x, weight, bias, down, up):
    """p = x @ down;  y = x @ weight.T + bias + p @ up"""
    return _load()[0].lowrank_linear(x, _panels(weight, False), bias, down, up)


def lowrank_linear_backward(dy, x, weight, down, up, p, needs, overwrite_x=False):
    """dp = dy @ up.T;  dx = dy @ weight + dp @ down.T;  ddown = x.T @ dp;  dup = p.T @ dy"""
    return _backward(_load()[0].lowrank_linear_backward, dy, x, weight, down, up, p, (), needs, overwrite_x)


def _backward(kernel, dy, x, weight, down, up, p, ids, needs, overwrite_x) -> list[Tensor]:
    need_x, need_weight, need_bias, need_down, need_up = needs
    fused = []
    if need_x or need_down or need_up:
        used = _of_backward(weight, len(dy)) if need_x else None
        read = x if need_down else None, down, up, p if need_up else None
        fused = kernel(dy, used, *read, *ids, overwrite_x and not need_weight)
    grads = iter(fused)
    found = [next(grads)] if need_x else []
    # these two have no low-rank part; only a weight or bias that is trained asks for them
    if need_weight or need_bias:
        check_memory("dy", dy)
    if need_weight:
        check_memory("x", x)
        found.append(torch.mm(dy.t(), x))
    if need_bias:
        found.append(dy.sum(0))
    return found + list(grads)


def mixed_linear(x, weight, bias, down, up, ids):
    """a = ids[m // (M / B)];  p[m] = x[m] @ down[a];  y[m] = x[m] @ weight.T + bias + p[m] @ up[a]"""
    return _load()[0].mixed_linear(x, _panels(weight, False), bias, down, up, ids)


def mixed_linear_backward(dy, x, weight, down, up, p, ids, needs, overwrite_x=False):
    """dp = dy @ up[a].T;  dx = dy @ weight + dp @ down[a].T;  ddown[a] = sum x.T @ dp;  dup[a] = sum p.T @ dy"""
    return _backward(_load()[0].mixed_linear_backward, dy, x, weight, down, up, p, (ids,), needs, overwrite_x)


def for_few_rows(x: Tensor, weight: Tensor, backward: bool) -> str | None:
    """How efft_linear computes these few rows: by this "kernel" or by "torch", from left to right, or as more rows."""
    return cpu_rules.way_of_few_rows(isa(), x, weight, backward)


def few_rows(x, weight, bias, u, sigma, v, scale) -> list[Tensor]:
    """y [..., N], p [M, P], q [M, S * Q]:  p = x @ u;  q = p @ sigma;  y = x @ weight.T + bias + scale * q @ v

    x [..., K], weight [S * N, K], u [K, P], sigma [P, Q] or [S, P, Q], v [Q, N]. An empty list where they do not fit.
    """
    return _few_rows()[0](x, weight, bias, u, sigma, v, scale)


def few_rows_backward(dy, x, weight, u, sigma, v, p, q, scale, needs) -> list[Tensor]:
    """dq = scale * dy @ v.T;  dp = dq @ sigma.T;  dx = dy @ weight + dp @ u.T;  du = x.T @ dp;  dsigma = p.T @ dq;
    dv = scale * q.T @ dy, of which ``needs`` (x, u, sigma, v) asks for some
    """
    if dy.dim() > 2:  # its rows must be one dimension
        dy = dy.contiguous()
    return _few_rows()[1](dy, x, weight, u, sigma, v, p, q, scale, *needs)


@functools.cache
def _few_rows():
    ops = _load()[0]
    return ops.few_rows.default, ops.few_rows_backward.default


def merge_(weights, downs, ups):
    """weight += (down @ up).T, in place; the sum is formed in float32 (float64 for float64) and rounded once"""
    if weights:
        _load()[0].merge_(weights, downs, ups)
