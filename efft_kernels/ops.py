"""The operators: argument checks, backend choice, shapes for tracing, autocast and gradients. Nothing else does any of these.

Each operator lives in torch's dispatcher under ``torch.ops.efft_kernels``; a call goes through

    autocast   casts the inputs of a forward, once, to the autocast dtype
    autograd   records one node, which saves only what the gradients that are asked for need
    kernel     checks the arguments, chooses a backend (kernels/__init__.py has their contract) and calls it

so the functions here, ``torch.ops.efft_kernels.*`` and a compiled graph all behave alike.
"""

import functools
import importlib
import importlib.util
import logging
import math
import numbers
import os
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .kernels import reference
from .kernels.tuning import table

_MODULES = {"cuda": "cuda", "triton": "triton", "cpu": "cpu", "reference": "reference"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = {Tensor, torch.nn.Parameter, type(None), str, float, int, list}  # no subclass that wants to see the op


# -- backends ---------------------------------------------------------------------------------------------------------


@functools.cache
def _load(name: str):
    """(module, None), or (None, why it cannot be had)"""
    if importlib.util.find_spec(f"efft_kernels.kernels.{_MODULES[name]}") is None:
        return None, f"this version of efft_kernels has no {name} backend"
    try:
        return importlib.import_module(f"efft_kernels.kernels.{_MODULES[name]}"), None
    except ImportError as error:
        return None, str(error)


def check_backend(name: str | None) -> None:
    """ValueError for a name that is no backend, whether or not it is available here"""
    if name is not None and name not in list(_MODULES):  # a list, for what cannot be hashed
        raise ValueError(f"backend must be one of {sorted(_MODULES)} or None, got {name!r}")


def _named(name: str, op: str, tensors):
    check_backend(name)
    module, reason = _load(name)
    reason = reason or module.unavailable() or module.unsupported(op, *tensors)
    if reason:
        raise RuntimeError(f"backend {name!r} cannot run {op} here: {reason}")
    return module


@functools.cache
def _default() -> str:
    return os.environ.get("EFFT_BACKEND", "")


@table.cached
def _candidates(device: torch.device) -> list:
    """The backends that may be chosen for tensors on this device, best first; until a record of the tuner changes"""
    names = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device.type, ())
    modules = [module for module in (_load(name)[0] for name in names) if module and not module.unavailable()]
    proven = [module for module in modules if not module.unproven(device)]
    if modules and not proven:
        _advise(device)
    return proven


@functools.cache
def _advise(device: torch.device) -> None:
    """Name the command that makes a GPU's kernels available, once per process and device"""
    logging.getLogger("efft_kernels").warning(
        "the kernels are not proven on this %s, plain torch is used; %s proves and tunes them", table.device_name(device),
        table.COMMAND,
    )  # fmt: skip


def _choose(backend: str, op: str, *tensors: Tensor | None, needs: list[bool] | None = None):
    """The backend module for this call. A named one must succeed; an automatic one must be proven and not slower."""
    if name := backend or _default():
        return _named(name, op, tensors)
    for module in _candidates(tensors[0].device):
        if not (module.slower(op, *tensors, needs=needs) or module.unsupported(op, *tensors)):
            return module
    return reference


class Backend(NamedTuple):
    """One line of :func:`backends`."""

    name: str
    available: bool  # backend="name" works in this process
    automatic: bool  # backend=None may choose it, shape by shape
    note: str  # why, or why not

    def __str__(self) -> str:
        state = "chosen automatically" if self.automatic else "on request" if self.available else "not available"
        return f"{self.name:<10} {state:<21} {self.note}"


def backends() -> list[Backend]:
    """What can compute here, what ``backend=None`` would choose, and why. ``print(*backends(), sep="\\n")`` reads well.

    The environment variable EFFT_BACKEND, read at the first call, names a backend for every call that names none.
    """
    found = []
    for name in _MODULES:
        module, reason = _load(name)
        if reason := reason or module.unavailable():
            found.append(Backend(name, False, False, reason))
        elif reason := _unproven(module):
            found.append(Backend(name, True, False, reason))
        else:
            found.append(Backend(name, True, True, (module.__doc__ or "").strip().partition("\n")[0]))
    return found


def _unproven(module) -> str | None:
    """Why no device of this process has the backend chosen for it, or None"""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    reasons = [module.unproven(device) for device in devices]
    return None if None in reasons else reasons[0]


# -- argument checks --------------------------------------------------------------------------------------------------


def _check_floats(first: str, like: Tensor, **others: Tensor | None) -> None:
    if like.dtype not in _FLOATS:
        raise TypeError(f"{first} must be float32, bfloat16, float16 or float64, got {like.dtype}")
    for name, t in others.items():
        if t is None:
            continue
        if t.dtype != like.dtype:
            raise TypeError(f"{name} must have the dtype of {first}, {like.dtype}, got {t.dtype}")
        if t.device != like.device:
            raise ValueError(f"{name} must be on the device of {first}, {like.device}, got {t.device}")


def _shape(name: str, t: Tensor, *dims: int | str) -> None:
    """dims: a number is required, a letter is free (but at least 1)"""
    good = t.dim() == len(dims) and all(n >= 1 if isinstance(d, str) else n == d for n, d in zip(t.shape, dims))
    if not good:
        wanted = ", ".join(map(str, dims))
        free = " with every letter at least 1" if any(isinstance(d, str) for d in dims) else ""
        raise ValueError(f"{name} must be [{wanted}]{free}, got {list(t.shape)}")


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> None:
    (N, K), (k, R) = weight.shape if weight.dim() == 2 else (0, 0), down.shape if down.dim() == 2 else (0, 0)
    if (
        # one expression for the good case: this runs at every call, the sentences below only before an error
        x.dtype == weight.dtype == down.dtype == up.dtype
        and x.dtype in _FLOATS
        and x.device == weight.device == down.device == up.device
        and N * K * R > 0
        and x.dim() > 0
        and x.shape[-1] == K == k
        and up.shape == (R, N)
        and (bias is None or (bias.shape == (N,) and bias.dtype == x.dtype and bias.device == x.device))
    ):
        return
    _check_floats("x", x, weight=weight, bias=bias, down=down, up=up)
    _shape("weight", weight, "N", "K")
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., {K}] for weight {list(weight.shape)}, got {list(x.shape)}")
    if bias is not None:
        _shape("bias", bias, N)
    _shape("down", down, K, "R")
    _shape("up", up, down.shape[1], N)


def _check_mixed(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, ids: Tensor) -> None:
    _check_floats("x", x, down=down, up=up)
    _shape("down", down, "A", "K", "R")
    _shape("up", up, down.shape[0], down.shape[2], "N")
    _check_linear(x, weight, bias, down[0], up[0])
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.device != x.device:
        raise ValueError(f"ids must be on the device of x, {x.device}, got {ids.device}")
    if ids.dim() != 1:
        raise ValueError(f"ids must be [B], got {list(ids.shape)}")
    _check_runs(math.prod(x.shape[:-1]), ids)


def _check_runs(rows: int, ids: Tensor) -> None:
    B = ids.shape[0]
    if rows % B if B else rows:
        raise ValueError(f"the rows of x must be a multiple of the {B} ids, got {rows}")


def _check_ids(ids: Tensor, A: int) -> None:
    """on a CPU: to read them on a GPU would make the host wait for it, there the kernels skip what is out of range"""
    if ids.device.type == "cpu" and ids.numel():
        first, last = ids.aminmax()
        if first < -1 or last >= A:
            raise ValueError(f"ids must be from -1 to {A - 1} for {A} adapters, got {int(first)} to {int(last)}")


def _check_group(sigma: Tensor, v: Tensor, scale: float) -> None:
    _check_floats("sigma", sigma, v=v)
    _shape("sigma", sigma, "S", "P", "Q")
    _shape("v", v, sigma.shape[2], "N")
    check_scale(scale)


def check_scale(scale):
    """scale; a scalar of numpy, which torch.compile would take for a tensor, as a float"""
    if type(scale) not in (int, float, torch.SymInt, torch.SymFloat):
        if not isinstance(scale, numbers.Real):
            hint = "; for a trained scale multiply sigma by it" if isinstance(scale, Tensor) else ""
            raise TypeError(f"scale must be a number, got {type(scale).__name__}{hint}")
        scale = float(scale)
    if not abs(scale) <= sys.float_info.max:  # an int may be beyond it
        raise ValueError(f"scale must be finite, got {scale}")
    return scale


def _check_needs(needs: list[bool], *readers: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """readers: (name, an activation that may be None, which gradients read it)"""
    for name, t, wanted in readers:
        if t is None and any(needs[i] for i in wanted):
            raise ValueError(f"{name} must be a tensor for needs={needs}, got None")


def _check_tensors(**tensors) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")


# -- kernels: what runs below autograd --------------------------------------------------------------------------------


def _rows(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _group_update(sigma, v, scale, backend):
    _check_group(sigma, v, scale)
    return _choose(backend, "group_update", sigma, v).group_update(sigma, v, scale)


def _group_update_backward(dup, sigma, v, scale, needs, backend):
    _check_group(sigma, v, scale)
    _check_floats("sigma", sigma, dup=dup)
    _shape("dup", dup, *sigma.shape[:2], v.shape[1])
    if len(needs) != 2:
        raise ValueError(f"needs must be two bools, for (sigma, v), got {needs}")
    module = _choose(backend, "group_update_backward", dup, sigma, v)
    return module.group_update_backward(dup, sigma, v, scale, needs)


def _lowrank_linear(x, weight, bias, down, up, backend):
    _check_linear(x, weight, bias, down, up)
    rows = _rows(x)
    y, p = _choose(backend, "lowrank_linear", rows, weight, bias, down, up).lowrank_linear(rows, weight, bias, down, up)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]), p


def _lowrank_linear_backward(dy, x, weight, down, up, p, needs, backend):
    if len(needs) != 5:
        raise ValueError(f"needs must be five bools, for (x, weight, bias, down, up), got {needs}")
    _check_needs(needs, ("x", x, (1, 3)), ("p", p, (4,)))
    _shape("weight", weight, "N", "K")
    N, K = weight.shape
    if dy.dim() < 1 or dy.shape[-1] != N:
        raise ValueError(f"dy must be [..., {N}] for weight {list(weight.shape)}, got {list(dy.shape)}")
    tensors = _rows(dy), _rows(x), weight, down, up, p
    M = tensors[0].shape[0]
    if x is not None:
        _shape("x", tensors[1], M, K)
    _check_linear(dy.new_empty(0, K) if x is None else tensors[1], weight, None, down, up)
    _check_floats("weight", weight, dy=dy, p=p)
    if p is not None:
        _shape("p", p, M, down.shape[1])
    module = _choose(backend, "lowrank_linear_backward", *tensors, needs=needs)
    grads = module.lowrank_linear_backward(*tensors, needs)
    if needs[0] and dy.dim() != 2:
        grads[0] = grads[0].view(*dy.shape[:-1], weight.shape[1])
    return grads


def _mixed_linear(x, weight, bias, down, up, ids, backend):
    _check_mixed(x, weight, bias, down, up, ids)
    _check_ids(ids, down.shape[0])
    tensors = _rows(x), weight, bias, down, up, ids.contiguous()
    y, p = _choose(backend, "mixed_linear", *tensors).mixed_linear(*tensors)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]), p


def _mixed_linear_backward(dy, x, weight, down, up, p, ids, needs, backend):
    if len(needs) != 5:
        raise ValueError(f"needs must be five bools, for (x, weight, bias, down, up), got {needs}")
    _check_needs(needs, ("x", x, (1, 3)), ("p", p, (4,)))
    _shape("weight", weight, "N", "K")
    N, K = weight.shape
    if dy.dim() < 1 or dy.shape[-1] != N:
        raise ValueError(f"dy must be [..., {N}] for weight {list(weight.shape)}, got {list(dy.shape)}")
    tensors = _rows(dy), _rows(x), weight, down, up, p, ids.contiguous()
    M = tensors[0].shape[0]
    if x is not None:
        _shape("x", tensors[1], M, K)
    _check_mixed(dy.new_empty(0, K) if x is None else tensors[1], weight, None, down, up, ids)
    _check_floats("weight", weight, dy=dy, p=p)
    _check_runs(M, ids)
    _check_ids(ids, down.shape[0])
    if p is not None:
        _shape("p", p, M, down.shape[2])
    grads = _choose(backend, "mixed_linear_backward", *tensors).mixed_linear_backward(*tensors, needs)
    if needs[0] and dy.dim() != 2:
        grads[0] = grads[0].view(*dy.shape[:-1], K)
    return grads


def _check_add(y: Tensor, x: Tensor | None, down: Tensor, up: Tensor) -> None:
    _check_floats("y", y, x=x, down=down, up=up)
    _shape("down", down, "K", "R")
    _shape("up", up, down.shape[1], "N")
    (K, _), N = down.shape, up.shape[1]
    if y.dim() < 1 or y.shape[-1] != N:
        raise ValueError(f"y must be [..., {N}] for up {list(up.shape)}, got {list(y.shape)}")
    if x is not None and x.shape != (*y.shape[:-1], K):
        raise ValueError(f"x must be {[*y.shape[:-1], K]} for y {list(y.shape)}, got {list(x.shape)}")


def _lowrank_add(y, x, down, up, backend):
    _check_add(y, x, down, up)
    rows = _rows(y), _rows(x), down, up
    z, p = _choose(backend, "lowrank_add", *rows).lowrank_add(*rows)
    return z.view(y.shape), p


def _lowrank_add_backward(dy, x, down, up, p, needs, backend):
    if len(needs) != 3:
        raise ValueError(f"needs must be three bools, for (x, down, up), got {needs}")
    _check_needs(needs, ("x", x, (1,)), ("p", p, (2,)))
    _check_add(dy, x, down, up)
    rows = _rows(dy), _rows(x), down, up, p
    if p is not None:
        _check_floats("dy", dy, p=p)
        _shape("p", p, rows[0].shape[0], down.shape[1])
    grads = _choose(backend, "lowrank_add_backward", *rows).lowrank_add_backward(*rows, needs)
    if needs[0]:
        grads[0] = grads[0].view(*dy.shape[:-1], down.shape[0])
    return grads


def _merge_(weights, downs, ups, backend):
    if not len(weights) == len(downs) == len(ups):
        raise ValueError(f"weights, downs and ups must be of equal length, got {len(weights)}, {len(downs)}, {len(ups)}")
    for i, (weight, down, up) in enumerate(zip(weights, downs, ups)):
        _check_floats("weights[0]", weights[0], **{f"weights[{i}]": weight, f"downs[{i}]": down, f"ups[{i}]": up})
        _shape(f"weights[{i}]", weight, "N", "K")
        _shape(f"downs[{i}]", down, weight.shape[1], "R")
        _shape(f"ups[{i}]", up, down.shape[1], weight.shape[0])
        if any(s == 0 and n > 1 for s, n in zip(weight.stride(), weight.shape)):
            raise ValueError(f"weights[{i}] must have an address for each value, got an expanded tensor")
    if len({weight.data_ptr() for weight in weights}) < len(weights):
        raise ValueError("weights must be distinct, got the same memory twice")
    if weights:
        _choose(backend, "merge_", *weights, *downs, *ups).merge_(weights, downs, ups)
        torch.autograd.graph.increment_version(weights)  # kernels write through pointers, which autograd does not see


# -- shapes for tracing -----------------------------------------------------------------------------------------------


def _group_update_fake(sigma, v, scale, backend):
    _check_group(sigma, v, scale)
    S, P, _ = sigma.shape
    return sigma.new_empty(P, S, v.shape[1]).transpose(0, 1)


def _group_update_backward_fake(dup, sigma, v, scale, needs, backend):
    return [t.new_empty(t.shape) for t, need in zip((sigma, v), needs) if need]


def _lowrank_linear_fake(x, weight, bias, down, up, backend):
    _check_linear(x, weight, bias, down, up)
    rows = math.prod(x.shape[:-1])
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(rows, down.shape[1])


def _lowrank_linear_backward_fake(dy, x, weight, down, up, p, needs, backend):
    N, K = weight.shape
    shapes = (*dy.shape[:-1], K), (N, K), (N,), down.shape, up.shape
    return [dy.new_empty(shape) for shape, need in zip(shapes, needs) if need]


def _mixed_linear_fake(x, weight, bias, down, up, ids, backend):
    _check_mixed(x, weight, bias, down, up, ids)
    rows = math.prod(x.shape[:-1])
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(rows, down.shape[2])


def _mixed_linear_backward_fake(dy, x, weight, down, up, p, ids, needs, backend):
    return _lowrank_linear_backward_fake(dy, x, weight, down, up, p, needs, backend)


def _lowrank_add_fake(y, x, down, up, backend):
    _check_add(y, x, down, up)
    return y.new_empty(y.shape), y.new_empty(math.prod(y.shape[:-1]), down.shape[1])


def _lowrank_add_backward_fake(dy, x, down, up, p, needs, backend):
    shapes = (*dy.shape[:-1], down.shape[0]), down.shape, up.shape
    return [dy.new_empty(shape) for shape, need in zip(shapes, needs) if need]


# -- gradients --------------------------------------------------------------------------------------------------------

_kernels = {}  # name of an op -> its kernel


def _below_autograd(name: str, *args):
    """The op; its kernel at once where no one in the dispatcher listens, for a small call costs little more than that"""
    heard = torch._C._len_torch_dispatch_stack() or torch._C._is_any_autocast_enabled()
    if not heard and all([type(a) in _PLAIN for a in args]):
        return _kernels[name](*args)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.efft_kernels, name).default(*args)


class _GroupUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sigma, v, scale, backend):
        ctx.save_for_backward(sigma, v)
        ctx.scale, ctx.backend = scale, backend
        return _below_autograd("group_update", sigma, v, scale, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dup):
        needs = list(ctx.needs_input_grad[:2])
        grads = iter(_below_autograd("group_update_backward", dup, *ctx.saved_tensors, ctx.scale, needs, ctx.backend))
        return *(next(grads) if need else None for need in needs), None, None


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, backend):
        y, p = _below_autograd("lowrank_linear", x, weight, bias, down, up, backend)
        need_weight, need_down, need_up = (ctx.needs_input_grad[i] for i in (1, 3, 4))
        # x and p are activations: held only for the gradients that read them
        ctx.save_for_backward(x if need_weight or need_down else None, weight, down, up, p if need_up else None)
        ctx.backend = backend
        ctx.mark_non_differentiable(p)
        ctx.set_materialize_grads(False)  # or every backward would fill a gradient of p with zeros
        return y, p

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 6
        needs = list(ctx.needs_input_grad[:5])
        grads = iter(_below_autograd("lowrank_linear_backward", dy, *ctx.saved_tensors, needs, ctx.backend))
        return *(next(grads) if need else None for need in needs), None


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, ids, backend):
        y, p = _below_autograd("mixed_linear", x, weight, bias, down, up, ids, backend)
        need_weight, need_down, need_up = (ctx.needs_input_grad[i] for i in (1, 3, 4))
        ctx.save_for_backward(
            x if need_weight or need_down else None, weight, down, up, p if need_up else None, ids
        )
        ctx.backend = backend
        ctx.mark_non_differentiable(p)
        ctx.set_materialize_grads(False)
        return y, p

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 7
        needs = list(ctx.needs_input_grad[:5])
        grads = iter(_below_autograd("mixed_linear_backward", dy, *ctx.saved_tensors, needs, ctx.backend))
        return *(next(grads) if need else None for need in needs), None, None


class _LowRankAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, down, up, backend):
        z, p = _below_autograd("lowrank_add", y, x, down, up, backend)
        _, _, need_down, need_up = ctx.needs_input_grad[:4]
        ctx.save_for_backward(x if need_down else None, down, up, p if need_up else None)
        ctx.backend = backend
        ctx.mark_non_differentiable(p)
        ctx.set_materialize_grads(False)
        return z, p

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 5
        needs = list(ctx.needs_input_grad[1:4])
        grads = iter(_below_autograd("lowrank_add_backward", dy, *ctx.saved_tensors, needs, ctx.backend))
        return dy, *(next(grads) if need else None for need in needs), None


# -- registration -----------------------------------------------------------------------------------------------------

_lib = torch.library.Library("efft_kernels", "DEF")


def _autocast(op, device: str, cast: bool):
    """A kernel for the autocast key: casts what autocast casts (float64 stays), then runs the op outside autocast."""
    off = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(*args):
        if cast:
            dtype = torch.get_autocast_dtype(device)
            args = [
                a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 else a
                for a in args
            ]
        with torch._C._ExcludeDispatchKeyGuard(off):
            return op(*args)

    return kernel


def _define(schema: str, kernel, fake, function=None):
    """One op: its kernel, its shapes for tracing and, for a forward, its gradients and its casts under autocast.

    Returns what a public function calls: it does what the dispatcher would and passes over the stations where nothing
    is to be done, which halves the cost of a small call.
    """
    name = schema.partition("(")[0]
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.efft_kernels, name).default
    _lib.impl(name, kernel, "CompositeExplicitAutograd")
    _kernels[name] = kernel
    torch.library.register_fake(f"efft_kernels::{name}", fake, lib=_lib)
    for device in ("cpu", "cuda"):
        _lib.impl(name, _autocast(op, device, cast=function is not None), f"Autocast{device.upper()}")
    if function is None:
        return op

    refusal = f"{name} supports neither torch.func transforms nor forward-mode differentiation"

    def differentiable(*args):
        if forward_ad._current_level >= 0:  # a tangent would be lost without a word
            raise RuntimeError(refusal)
        if torch.is_grad_enabled() and any([isinstance(a, Tensor) and a.requires_grad for a in args]):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def call(*args):
        if torch.compiler.is_compiling():
            return op(*args)
        if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(refusal)
        if torch._C._is_any_autocast_enabled():
            return op(*args)
        if torch.is_grad_enabled() and any([isinstance(a, Tensor) and a.requires_grad for a in args]):
            return function.apply(*args)
        if torch._C._len_torch_dispatch_stack() == 0 and all([type(a) in _PLAIN for a in args]):
            return kernel(*args)
        return op(*args)

    _lib.impl(name, differentiable, "Autograd")
    return call


_call_group_update = _define(
    "group_update(Tensor sigma, Tensor v, float scale, str backend) -> Tensor",
    _group_update,
    _group_update_fake,
    _GroupUpdate,
)
_define(
    "group_update_backward(Tensor dup, Tensor sigma, Tensor v, float scale, bool[] needs, str backend) -> Tensor[]",
    _group_update_backward,
    _group_update_backward_fake,
)
_call_lowrank_linear = _define(
    "lowrank_linear(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, str backend) -> (Tensor, Tensor)",
    _lowrank_linear,
    _lowrank_linear_fake,
    _LowRankLinear,
)
_define(
    "lowrank_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor down, Tensor up, Tensor? p, bool[] needs, "
    "str backend) -> Tensor[]",
    _lowrank_linear_backward,
    _lowrank_linear_backward_fake,
)
_call_mixed_linear = _define(
    "mixed_linear(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor ids, str backend) "
    "-> (Tensor, Tensor)",
    _mixed_linear,
    _mixed_linear_fake,
    _MixedLinear,
)
_define(
    "mixed_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor down, Tensor up, Tensor? p, Tensor ids, "
    "bool[] needs, str backend) -> Tensor[]",
    _mixed_linear_backward,
    _mixed_linear_backward_fake,
)
_call_lowrank_add = _define(
    "lowrank_add(Tensor y, Tensor x, Tensor down, Tensor up, str backend) -> (Tensor, Tensor)",
    _lowrank_add,
    _lowrank_add_fake,
    _LowRankAdd,
)
_define(
    "lowrank_add_backward(Tensor dy, Tensor? x, Tensor down, Tensor up, Tensor? p, bool[] needs, str backend) "
    "-> Tensor[]",
    _lowrank_add_backward,
    _lowrank_add_backward_fake,
)
_call_merge_ = _define(
    "merge_(Tensor(a!)[] weights, Tensor[] downs, Tensor[] ups, str backend) -> ()",
    _merge_,
    lambda weights, downs, ups, backend: None,
)


# -- public functions -------------------------------------------------------------------------------------------------


def group_update(
    sigma: Tensor,  # [S, P, Q]
    v: Tensor,  # [Q, N]
    scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:  # [S, P, N]
    """up[s] = scale * sigma[s] @ v, for every slice of a tensor-train group in one launch.

    The update of one matrix is dW_s = scale * U @ Sigma_s @ V (EFFT, arXiv 2311.06749, section 3.2); the result is its
    right part, what :func:`lowrank_linear` calls ``up``. Differentiable in sigma and v.

    Args:
        sigma: the cores, [S, P, Q]; float32, bfloat16, float16 or float64, any strides.
        v: [Q, N], dtype and device of sigma.
        scale: a finite number.
        backend: a name from :func:`backends`, or None for the fastest that is proven for these inputs.

    Returns:
        [S, P, N] in the dtype of sigma. Its memory is [P, S, N]: ``up.transpose(0, 1).flatten(1)``, the slices side by
        side as a fused qkv needs them, is a view.

    Raises:
        TypeError: an argument that is not a tensor, a dtype that is not one of the four, or two different dtypes.
        ValueError: a shape that does not fit, different devices, a scale that is not finite, an unknown backend.
        RuntimeError: the named backend cannot run this; the message says why.
    """
    _check_tensors(sigma=sigma, v=v)
    return _call_group_update(sigma, v, check_scale(scale), backend or "")


def lowrank_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [K, R]
    up: Tensor,  # [R, N]
    *,
    backend: str | None = None,
) -> Tensor:  # [..., N]
    """y = x @ weight.T + bias + (x @ down) @ up, without forming down @ up.

    The forward of every adapter of the family (LoRA, FacT, EFFT): they differ only in how (down, up) are made.
    Differentiable once, in all five; only the gradients that are asked for are computed.

    Args:
        x: [..., K]; float32, bfloat16, float16 or float64. Any rank, any strides, empty batches too.
        weight: [N, K], usually frozen. On a CPU a frozen weight is kept a second time in the layout of the kernel.
        bias: [N] or None.
        down: [K, R], any strides (``v.T`` is fine).
        up: [R, N], any strides (a slice of a wider matrix is fine).
        backend: a name from :func:`backends`, or None for the fastest that is proven for these inputs.

    Returns:
        [..., N] in the dtype of x; under autocast all inputs are first cast to its dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`group_update`.
    """
    for t in (x, weight, down, up, x if bias is None else bias):
        if not isinstance(t, Tensor):
            _check_tensors(x=x, weight=weight, bias=x if bias is None else bias, down=down, up=up)
    return _call_lowrank_linear(x, weight, bias, down, up, backend or "")[0]


def mixed_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [A, K, R]
    up: Tensor,  # [A, R, N]
    ids: Tensor,  # [B]
    *,
    backend: str | None = None,
) -> Tensor:  # [..., N]
    """A low-rank linear for a batch whose samples have different adapters, in one pass.

    The rows of x, its leading dimensions flattened, are B runs of equal length, one for each id; a row m of run b has
    y[m] = x[m] @ weight.T + bias + (x[m] @ down[ids[b]]) @ up[ids[b]], and without the last term where ids[b] is -1.
    Differentiable once, in all five float arguments; gradients of adapters that no id names are zero.

    Args:
        x, weight, bias: as :func:`lowrank_linear`. The number of rows is a multiple of B: x [B, T, K] for images, and
            [B * W, T, K] where W windows of each image stand one after the other.
        down: [A, K, R], up: [A, R, N], the pairs of A adapters, any strides.
        ids: [B] of int64, each from -1 to A - 1. On a GPU the host does not read them: there one that is out of range
            counts as -1.
        backend: a name from :func:`backends`, or None for the fastest that is proven for these inputs.

    Returns:
        [..., N] in the dtype of x; under autocast all inputs but the ids are first cast to its dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`group_update`.
    """
    _check_tensors(x=x, weight=weight, bias=x if bias is None else bias, down=down, up=up, ids=ids)
    return _call_mixed_linear(x, weight, bias, down, up, ids, backend or "")[0]


def lowrank_add(
    y: Tensor,  # [..., N]
    x: Tensor,  # [..., K]
    down: Tensor,  # [K, R]
    up: Tensor,  # [R, N]
    *,
    backend: str | None = None,
) -> Tensor:  # [..., N]
    """y + (x @ down) @ up: :func:`lowrank_linear` beside a product that is somebody else's, of a quantized weight say.

    Differentiable once, in all four; only the gradients that are asked for are computed.

    Args:
        y: [..., N]; float32, bfloat16, float16 or float64. It is not written to.
        x: [..., K], its leading dimensions those of y.
        down: [K, R], up: [R, N], any strides.
        backend: a name from :func:`backends`, or None for the fastest that is proven for these inputs.

    Returns:
        [..., N] in the dtype of y; under autocast all inputs are first cast to its dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`group_update`.
    """
    _check_tensors(y=y, x=x, down=down, up=up)
    return _call_lowrank_add(y, x, down, up, backend or "")[0]


def efft_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [S * N, K]
    bias: Tensor | None,  # [S * N]
    u: Tensor,  # [K, P]
    sigma: Tensor,  # [P, Q] or [S, P, Q]
    v: Tensor,  # [Q, N]
    scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:  # [..., S * N]
    """y = x @ weight.T + bias + scale * x @ u @ sigma @ v, without forming the dense update.

    With sigma [S, P, Q] the S slices stand side by side, as in a fused qkv: columns s*N to (s+1)*N get
    scale * x @ u @ sigma[s] @ v. This is equation x W + dW of EFFT (arXiv 2311.06749, section 3.2) with
    dW_s = scale * U @ Sigma_s @ V, computed as one :func:`group_update` and one :func:`lowrank_linear`.

    Args:
        x, weight, bias: as in :func:`lowrank_linear`.
        u: [K, P], sigma: [P, Q] or [S, P, Q], v: [Q, N]; dtype and device of x.
        scale: a finite number.
        backend: a name from :func:`backends`, or None for the fastest that is proven for these inputs.

    Returns:
        [..., S * N] in the dtype of x.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`group_update`.
    """
    _check_tensors(x=x, weight=weight, u=u, sigma=sigma, v=v)
    if sigma.dim() == 2:
        sigma = sigma.unsqueeze(0)
    _shape("sigma", sigma, "S", "P", "Q")
    S, P, Q = sigma.shape
    _shape("v", v, Q, "N")
    _shape("weight", weight, S * v.shape[1], "K")
    _shape("u", u, weight.shape[1], P)
    up = group_update(sigma, v, scale, backend=backend)
    return lowrank_linear(x, weight, bias, u, up.transpose(0, 1).flatten(1), backend=backend)


def merge_(
    weights: list[Tensor],  # each [N, K]
    downs: list[Tensor],  # each [K, R]
    ups: list[Tensor],  # each [R, N]
    *,
    backend: str | None = None,
) -> None:
    """weight += (down @ up).T, in place, for all of them in one launch and without a dense update tensor.

    Sums run in float32 (float64 for float64) and are rounded once to the dtype of the weight. A bfloat16 or float16
    weight cannot hold most of a small update: where that matters, merge into float32.

    Args:
        weights, downs, ups: lists of equal length, one dtype and one device; the sizes may differ from entry to entry.
        backend: as in :func:`group_update`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`group_update`, before anything is written.
    """
    for what, tensors in (("weights", weights), ("downs", downs), ("ups", ups)):
        _check_tensors(**{f"{what}[{i}]": t for i, t in enumerate(tensors)})
    with torch.no_grad():
        _call_merge_(list(weights), list(downs), list(ups), backend or "")
