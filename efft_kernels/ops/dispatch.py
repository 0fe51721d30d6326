"""Which backend computes a call, and which way a call takes there: through torch's dispatcher or past it.

A call skips the dispatcher when only autocast and autograd would have anything to do there, which is done here instead;
``direct`` alone decides that, for forward and backward. A call is checked and given a backend once for each set of
shapes, strides, dtypes and devices (``decisions``).
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import kernels
from ..kernels import Kernels, decisions, reference
from ..kernels.tuning import table
from .checks import check_tensors

_NAMES = ("cuda", "triton", "cpu", "reference")
# type of device -> backends that backend=None may choose there, best first
_AUTOMATIC = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_REMEMBERED = 4096  # decisions at most


@functools.cache
def load(name: str) -> tuple[Kernels | None, str | None]:
    """(the backend's module, None), or (None, why it cannot be imported)"""
    if importlib.util.find_spec(f"{kernels.__name__}.{name}") is None:
        return None, f"this version of efft_kernels has no {name} backend"
    try:
        return importlib.import_module(f"{kernels.__name__}.{name}"), None
    except ImportError as error:
        return None, str(error)


def check_backend(name: str | None) -> None:
    """ValueError for a name that is not a backend's, whether or not that backend is available here"""
    if name is not None and name not in list(_NAMES):  # a list, because a name may not be hashable
        raise ValueError(f"backend must be one of {sorted(_NAMES)} or None, got {name!r}")


@functools.cache
def default_backend() -> str | None:
    return os.environ.get("EFFT_BACKEND") or None


@table.cached
def candidates(device: torch.device) -> list[Kernels]:
    """The backends that may be chosen for tensors on this device, best first"""
    modules = [module for module in (load(name)[0] for name in _AUTOMATIC.get(device.type, ())) if module]
    able = [module for module in modules if not module.unavailable()]
    proven = [module for module in able if not module.unproven(device)]
    if able and not proven:
        _advise(device)
    return proven


@functools.cache
def _advise(device: torch.device) -> None:
    """Name the command that makes a GPU's kernels available, once per process and device"""
    logging.getLogger("efft_kernels").warning(
        "the kernels are not proven on this %s, plain torch is used; %s proves and tunes them",
        table.device_name(device),
        table.COMMAND,
    )


def select(op: str, backend: str | None, *tensors: Tensor | None, needs: list[bool] | None = None) -> Kernels:
    """The module that computes this call. A named backend must be able to; an automatic one must also be faster.

    needs: of a backward, which decides what is compared.

    Raises:
        ValueError: a name that is not a backend's. RuntimeError: the named backend cannot run this.
    """
    if name := backend or default_backend():
        check_backend(name)
        module, reason = load(name)
        if module is None or (reason := module.unavailable() or module.unsupported(op, *tensors)):
            raise RuntimeError(f"backend {name!r} cannot run {op} here: {reason}")
        return module
    for module in candidates(tensors[0].device):
        if not (module.slower(op, *tensors, needs=needs) or module.unsupported(op, *tensors)):
            return module
    return reference


def signature(*tensors: Tensor | None) -> list:
    """All that the checks of a call and the choice of its backend read of these tensors"""
    found = []
    for t in tensors:
        found += (None,) if t is None else (t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.data_ptr() & 15)
    return found


def decide(key: tuple, *tensors: Tensor | None, needs: list[bool] | None = None) -> Kernels:
    """:func:`select` for a call whose arguments were checked, remembered as ``decisions[key]``

    key: (op, backend, and all that the checks and the choice depend on).
    """
    op, backend, *_ = key
    return remember(key, select(op, backend, *tensors, needs=needs))


def remember(key: tuple, decision: Kernels | Callable) -> Kernels | Callable:
    """Keep what computes the calls of this key"""
    if len(decisions) >= _REMEMBERED:
        decisions.clear()
    decisions[key] = decision
    return decision


class Backend(NamedTuple):
    """One line of :func:`backends`."""

    name: str
    available: bool  # backend="name" works in this process
    automatic: bool  # backend=None may choose it, depending on the shapes
    note: str  # why, or why not

    def __str__(self) -> str:
        state = "chosen automatically" if self.automatic else "on request" if self.available else "not available"
        return f"{self.name:<10} {state:<21} {self.note}"


def backends() -> list[Backend]:
    """What can compute here, what ``backend=None`` would choose, and why. ``print(*backends(), sep="\\n")`` reads well.

    The environment variable EFFT_BACKEND, read at the first call, names a backend for every call that names none.
    """
    found = []
    for name in _NAMES:
        module, reason = load(name)
        if module is None or (reason := module.unavailable()):
            found.append(Backend(name, False, False, reason))
        elif reason := _unproven(module):
            found.append(Backend(name, True, False, reason))
        else:
            found.append(Backend(name, True, True, (module.__doc__ or "").strip().partition("\n")[0]))
    return found


def _unproven(module: Kernels) -> str | None:
    """Why the backend is not chosen on any device of this process, or None"""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    reasons = [module.unproven(device) for device in devices]
    return None if None in reasons else reasons[0]


# the private names of torch that the package needs, but those that docs/architecture.md names
_modes, without_modes = torch._C._len_torch_dispatch_stack, torch.utils._python_dispatch._disable_current_modes
any_autocast = torch._C._is_any_autocast_enabled
tracing = torch._C._get_tracing_state  # torch.jit.trace records the op, not what its kernel is made of
_pack_hooks = torch._C._autograd._top_saved_tensors_default_hooks
graph_task = torch._C._current_graph_task_id
at_end_of_backward = lambda call: torch.autograd.Variable._execution_engine.queue_callback(call)
_functorch_level, _batched = torch._C._functorch.peek_interpreter_stack, torch._C._functorch.is_legacy_batchedtensor
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_Exclude, _KeySet, _Key = torch._C._ExcludeDispatchKeyGuard, torch._C.DispatchKeySet, torch._C.DispatchKey

_REFUSAL = "{} supports neither torch.func transforms nor forward-mode differentiation"
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}  # other subclasses may want to see the op


def direct(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors may skip the dispatcher: only autocast (see Call) and autograd act there"""
    if torch.compiler.is_compiling() or _modes() or tracing():
        return False
    if forward_ad._current_level >= 0 or _functorch_level() is not None:
        return False
    for t in tensors:
        if type(t) not in _PLAIN:
            return False
    return True


def direct_outside_autocast(*tensors: Tensor | None) -> bool:
    """The same where autocast is off, for what casts nothing"""
    return not any_autocast() and direct(*tensors)


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these tensors"""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def pack_hooks() -> tuple[Callable, Callable] | None:
    """The hooks that pack and unpack what is saved for a backward now, or None"""
    return _pack_hooks(False)


def raw_stream(device: torch.device) -> int | None:
    """The stream that computes now; None on a CPU"""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else None


def refuse_transforms(name: str) -> None:
    """RuntimeError under torch.func and forward-mode differentiation, which would silently lose a tangent"""
    if not torch.compiler.is_compiling() and (forward_ad._current_level >= 0 or _functorch_level() is not None):
        raise RuntimeError(_REFUSAL.format(name))


def below_autograd(op, *args):
    """Call the op through the dispatcher, below the autograd and autocast keys"""
    with _BelowAutograd():
        return op(*args)


class Call:
    """How the function of an op calls it: directly where that is the same, else through torch's dispatcher.

    compute: what the op does, below autograd. function: its gradients, whose ``apply`` takes ``compute`` before the
    arguments of the op.
    """

    def __init__(self, op, compute: Callable, function: type[torch.autograd.Function]):
        self.op, self.compute, self._record = op, compute, function.apply
        self.name = op._schema.name.partition("::")[2]
        self.tensors = sum("Tensor" in str(argument.type) for argument in op._schema.arguments)  # the first arguments
        self.several = len(op._schema.returns) > 1

    def __call__(self, *args) -> Tensor:
        """The op's first result"""
        tensors = args[: self.tensors]
        try:
            if not direct(*tensors):
                refuse_transforms(self.name)
                return self._first(self.op(*args))
            if any_autocast() and (device := tensors[0].device.type) in _AUTOCAST and torch.is_autocast_enabled(device):
                args = _cast(device, args)
                with _Exclude(_AUTOCAST[device]):
                    return self._compute(args[: self.tensors], args)
            return self._compute(tensors, args)
        except RuntimeError:  # of torch, where a tensor has no strides, or no address: looked at only now
            names = (argument.name for argument in self.op._schema.arguments)
            check_tensors(**{name: t for name, t in zip(names, tensors) if t is not None})
            raise

    def _compute(self, tensors: Sequence[Tensor | None], args: Sequence) -> Tensor:
        return self._record(self.compute, *args) if records(*tensors) else self._first(self.compute(*args))

    def _first(self, result) -> Tensor:
        return result[0] if self.several else result


def once(backward: Callable) -> Callable:
    """A backward whose gradients cannot be differentiated: a second derivative raises instead of lacking their part.

    torch's own once_differentiable raises only where ``grads`` require grad and the leaves are not named.
    """

    def choose(ctx, *grads):
        for grad in grads:
            if grad is not None and _batched(grad):  # by vectorize=True or is_grads_batched=True
                raise RuntimeError(_REFUSAL.format("a backward of efft_kernels"))
        if not torch.is_grad_enabled():  # the usual case
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        read = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        results = iter(_Once.apply(len(read), *read, *(t for t in found if t is not None)))
        return tuple(t if t is None else next(results) for t in found)

    return choose


class _Once(torch.autograd.Function):
    """The gradients that a backward has computed, with what it has read as their origin."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(t.detach() for t in tensors[count:])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("the operators of efft_kernels are differentiable once; a second derivative was asked for")


_library = torch.library.Library("efft_kernels", "DEF")


def register(schema: str, compute: Callable, fake: Callable, function: type[torch.autograd.Function] | None = None):
    """Define an op of torch and return it; with gradients, the :class:`Call` of it.

    compute: what the op does, below autograd. fake: its results' shapes, for tracing. function: its gradients, for a
    forward; ``function.apply`` takes, before the arguments of the op, what computes the forward.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.efft_kernels, name).default
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"efft_kernels::{name}", fake, lib=_library)
    for device in ("cpu", "cuda"):
        _library.impl(name, _autocast(op, device, cast=function is not None), f"Autocast{device.upper()}")
    if function is not None:
        below, count = functools.partial(below_autograd, op), len(op._schema.arguments)

        def autograd(*args):
            args += (None,) * (count - len(args))  # the dispatcher leaves out a backend that is None
            if forward_ad._current_level >= 0:
                raise RuntimeError(_REFUSAL.format(name))
            tensors = [a for a in args if isinstance(a, Tensor)]
            if records(*tensors):
                return function.apply(below, *args)
            # in a compiled graph, which differentiates by itself: the dispatcher need not be asked again
            here = tensors[0].device.type in _AUTOCAST and direct_outside_autocast(*tensors)
            return compute(*args) if here else below(*args)

        _library.impl(name, autograd, "Autograd")
    return op if function is None else Call(op, compute, function)


_AUTOCAST = {device: _KeySet(getattr(_Key, f"Autocast{device.upper()}")) for device in ("cpu", "cuda")}


def _autocast(op, device: str, cast: bool) -> Callable:
    """A kernel for the autocast key: casts what autocast casts, then runs the op outside of autocast"""

    def kernel(*args):
        if cast:
            args = _cast(device, args)
        with _Exclude(_AUTOCAST[device]):
            return op(*args)

    return kernel


def _cast(device: str, given: Sequence) -> list:
    """The arguments of a forward, x and weight first, as autocast casts them; float64 stays"""
    dtype = torch.get_autocast_dtype(device)
    args = [
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() and a.dtype is not torch.float64 else a
        for a in given
    ]
    x = args[0]
    if x is not given[0] and x.requires_grad and given[0]._version:
        x.efft_source_changed = True  # producers.py cannot see the tensor behind the cast
    weight = given[1]
    if type(weight) is torch.nn.Parameter and not weight.requires_grad and args[1] is not weight:
        args[1].efft_cast_of = weight  # it outlives the step, so its cast need not
    return args
