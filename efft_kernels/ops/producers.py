"""x of a backward, rebuilt from what the operation that made it has saved.

The gradient of ``down`` reads x. A norm, an activation function or a product that made x has saved its own inputs for
its own gradient, so x can be computed from these once more instead of being kept until the backward: the same
operation on the same tensors gives the same bits. An adapted model then holds the activations of a frozen one.

x is saved as before wherever that is not certain: the producer is unknown or has saved too little, a tensor was changed
in place, or hooks on saved tensors have packed what the producer saved (checkpointing, offloading). A change in place
after the forward is an error in the backward, as it is for every saved tensor. Writes that autograd does not see
(``.data``, ``torch.no_grad()``) are noticed on x, its views and the producer's inputs, but not on an activation that
was then copied into another layout or dtype before it became x.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dispatch import any_autocast, graph_task, pack_hooks, raw_stream, tracing, without_modes

_enabled: bool | None = None  # None: on a CPU
_LONGEST = 8  # operations between the producer and x
_INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32}  # 16 bits otherwise


def rebuild_inputs(enabled: bool | None) -> None:
    """Whether the inputs of adapted Linears are rebuilt in the backward or kept from the forward on.

    Rebuilding runs each norm and activation function in front of an adapted Linear once more, and the casts that
    autocast makes of frozen weights. The gradients have the same bits either way. The setting holds for the process,
    from the next forward on.

    Args:
        enabled: None, the default, rebuilds on a CPU and keeps elsewhere: on an H200 a step of ViT-B in the memory of
            the frozen model takes 7 % longer from a CUDA graph, and 22 % longer where it waits for the host, both
            relative to the frozen model of the same run.

    Raises:
        TypeError: enabled is neither a bool nor None.
    """
    global _enabled
    if not (enabled is None or isinstance(enabled, bool)):
        raise TypeError(f"enabled must be True, False or None, got {enabled!r}")
    _enabled = enabled


def rebuilds(t: Tensor) -> bool:
    """Whether inputs on the device of t are rebuilt."""
    return t.is_cpu if _enabled is None else _enabled


class _Share:
    """What several Linears that read one x have in common: it is rebuilt once in a backward, for all of them."""

    __slots__ = ("held", "users")

    def __init__(self):
        self.users = 0
        self.held: tuple[Any, Tensor, list] | None = None  # (backward and stream, x, users that still come)


class Recipe:
    """How x is made from the saved tensors: the producer's operation, then those that lie between it and x."""

    __slots__ = ("moves", "produce", "share", "versions")

    def __init__(self, produce: Callable, moves: list[Callable], share: _Share, versions: tuple[int, ...] | None):
        self.produce, self.moves, self.share = produce, moves, share
        self.versions = versions  # of the tensors, where hooks keep torch from comparing them

    def build(self, tensors: list[Tensor]) -> Tensor:
        x = self.produce(tensors)
        for move in self.moves:
            x = move(x, tensors)
        return x

    def x(self, tensors: list[Tensor]) -> tuple[Tensor, bool]:
        """(x in a backward, whether nobody else will read it)"""
        if self.versions is not None:
            _check_versions(tensors, self.versions)
        share = self.share
        if share.users == 1:
            return self.x_outside_autocast(tensors), True
        # a tensor that another stream computes might not be there yet
        now, held = (graph_task(), raw_stream(tensors[0].device)), share.held
        if held is None or held[0] != now:
            held = share.held = now, self.x_outside_autocast(tensors), [None] * share.users
        _, x, left = held
        left.pop()
        if not left:
            share.held = None
        return x, not left

    def x_outside_autocast(self, tensors: list[Tensor]) -> Tensor:
        if not any_autocast():
            return self.build(tensors)
        with torch.autocast(tensors[0].device.type, enabled=False):
            return self.build(tensors)


def _check_versions(tensors: list[Tensor], versions: tuple[int, ...]) -> None:
    for t, version in zip(tensors, versions):
        if t._version not in (version, 0):  # 0: the hooks made a copy
            raise RuntimeError(
                "one of the tensors needed to rebuild the input of an adapted Linear was modified in place after the "
                f"forward: a tensor of shape {list(t.shape)} is at version {t._version}, expected {version}"
            )


def kept_for(x: Tensor) -> tuple[Recipe | None, tuple[Tensor, ...]]:
    """What a forward saves in order to have x in its backward: (None, (x,)) or (recipe, the tensors that it takes)."""
    if rebuilds(x) and (node := x.grad_fn) is not None and not x._version and x.is_contiguous():
        found = _find(x, node)
        if found is not None:
            return found
    return None, (x,)


def kept_weight(weight: Tensor) -> Tensor:
    """What a forward saves of a weight: the frozen parameter itself where this is what autocast has made of it"""
    return getattr(weight, "efft_cast_of", weight) if rebuilds(weight) else weight


def cast_again(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of a backward, of what :func:`kept_weight` gave"""
    if weight.dtype == dtype:
        return weight
    cast = weight.detach().to(dtype)
    cast.efft_cast_of = weight
    return cast


def _find(x: Tensor, node) -> tuple[Recipe, tuple[Tensor, ...]] | None:
    if torch.compiler.is_compiling() or tracing() or type(x) is not Tensor:
        return None  # a compiler decides by itself what to compute once more
    saved, moves, size = _Saved(x), [], x.shape
    first, key = node, ("efft_kernels", x.dtype)
    if type(node).__name__ == "ToCopyBackward0":
        if getattr(x, "efft_source_changed", False):
            return None
        first = node.next_functions[0][0]  # q, k and v each cast the same tensor under autocast
    try:
        for _ in range(_LONGEST):
            name = type(node).__name__
            if name in _PRODUCERS:
                if produce := _PRODUCERS[name](node, saved):
                    break
            step = _MOVES.get(name)
            found = step and step(node, size, saved)
            if not found:
                return None
            move, node, size = found
            if move is not None:
                moves.append(move)
        else:
            return None
    except _NotSaved:
        return None
    moves.reverse()
    share = first.metadata.setdefault(key, _Share())
    recipe = Recipe(produce, moves, share, saved.versions())
    if isinstance(produce, _Norm) and not produce.proven(recipe, saved.tensors, x):
        return None
    if saved.doubtful and not _gives(recipe, saved.tensors, x):
        return None
    share.users += 1
    return recipe, tuple(saved.tensors)


class _NotSaved(Exception):
    """A node does not hold a tensor, or not the one that it was given."""


class _Saved:
    """The tensors of a recipe, as the nodes of the graph have saved them."""

    def __init__(self, x: Tensor):
        self.device, self.dtype, self.width = x.device, x.dtype, x.shape[-1]
        self.hooked = pack_hooks() is not None
        self.doubtful = False  # whether a tensor may have changed between its producer and now
        self.tensors: list[Tensor] = []

    def take(self, node, name: str, given_by: int = -1) -> int:
        """The place among the tensors that the node's saved one gets; given_by: the number of its input."""
        raw = _raw(node, name)
        if (raw.unpack_hook is not None) != self.hooked:
            raise _NotSaved  # unpacking might recompute a checkpoint or fetch a tensor from elsewhere
        if self.hooked:
            t = raw.data
            if type(t) is Tensor:
                # only the very tensor, as hooks that look or count return it, and not one that is made from it
                if t.grad_fn is None or t.grad_fn is not node.next_functions[given_by][0]:
                    raise _NotSaved
                self.doubtful |= t._version > 0
            elif type(t) is not nn.Parameter:
                raise _NotSaved
        else:
            try:
                t = getattr(node, f"_saved_{name}")
            except RuntimeError:  # changed in place since
                raise _NotSaved from None
        if t is None or type(t) not in (Tensor, nn.Parameter) or t.device != self.device:
            raise _NotSaved
        self.tensors.append(t)
        return len(self.tensors) - 1

    def has(self, node, name: str) -> bool:
        return _raw(node, name).data is not None

    def versions(self) -> tuple[int, ...] | None:
        return tuple(t._version for t in self.tensors) if self.hooked else None


def _raw(node, name: str):
    """What the node has saved, not unpacked"""
    try:
        return getattr(node, f"_raw_saved_{name}")
    except RuntimeError:  # freed by an earlier backward
        raise _NotSaved from None


def _activation(function: Callable) -> Callable:
    def producer(node, saved: _Saved) -> Callable:
        i = saved.take(node, "self", 0)
        return lambda tensors: function(tensors[i])

    return producer


def _gelu(node, saved: _Saved) -> Callable:
    i, approximate = saved.take(node, "self", 0), node._saved_approximate
    return lambda tensors: F.gelu(tensors[i], approximate=approximate)


def _product(node, saved: _Saved) -> Callable | None:
    """Of two tensors that are both saved, as in SwiGLU"""
    if not (saved.has(node, "self") and saved.has(node, "other")):
        return None
    i, j = saved.take(node, "self", 0), saved.take(node, "other", 1)
    return lambda tensors: tensors[i] * tensors[j]


def _attention(node, saved: _Saved) -> Callable | None:
    """The product of attention weights and values, where its sum is short against the width of x"""
    if not (saved.has(node, "self") and saved.has(node, "mat2")):
        return None
    i, j = saved.take(node, "self", 0), saved.take(node, "mat2", 1)
    if saved.tensors[i].shape[-1] > max(64, saved.width // 2):
        return None
    return lambda tensors: torch.bmm(tensors[i], tensors[j])


class _Norm:
    """A layer norm or RMS norm, whose node saves all but eps: that of the module whose weight it is."""

    def __init__(self, node, saved: _Saved, rms: bool):
        self.rms, self.shape = rms, node._saved_normalized_shape
        self.input, self.weight = saved.take(node, "input", 0), saved.take(node, "weight", 1)
        self.bias = saved.take(node, "bias", 2) if not rms and saved.has(node, "bias") else None
        weight = saved.tensors[self.weight]
        module, self.proofs = _norm_of(weight)
        if module is None or not weight.data_ptr():  # FSDP has freed it after the norm's forward
            raise _NotSaved
        self.eps = _eps(module)

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        x, weight = tensors[self.input], tensors[self.weight]
        if self.rms:
            return F.rms_norm(x, self.shape, weight, self.eps)
        bias = None if self.bias is None else tensors[self.bias]
        return torch.native_layer_norm(x, self.shape, weight, bias, self.eps)[0]

    def proven(self, recipe: Recipe, tensors: list[Tensor], x: Tensor) -> bool | None:
        """Whether this module's eps has given the bits of its output: compared once, and again if eps changes."""
        proof = self.proofs.get(key := (self.eps, x.dtype, x.device))
        if proof is None and (proof := _gives(recipe, tensors, x)) is not None:
            self.proofs[key] = proof
        return proof


def _gives(recipe: Recipe, tensors: list[Tensor], x: Tensor) -> bool | None:
    """Whether the recipe gives the bits of x; None where it cannot be compared, because that waits for the GPU"""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    integers = _INTEGERS.get(x.dtype, torch.int16)  # nan differs from itself, its bits do not
    with torch.no_grad(), without_modes():
        made = recipe.x_outside_autocast(tensors)
        if made.dtype != x.dtype or made.shape != x.shape or not made.is_contiguous():
            return False
        return torch.equal(made.view(integers), x.detach().view(integers))


def _eps(module: nn.Module) -> float | None:
    return getattr(module, "eps", None) if hasattr(module, "eps") else getattr(module, "variance_epsilon", None)


# models whose norms may be asked for their eps
_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# id(weight) -> (weak references to it and to the norm that owns it, {(eps, dtype, device): whether that gave the bits})
_norms: dict[int, tuple[weakref.ref, Callable[[], nn.Module | None], dict]] = {}


def know(model: nn.Module) -> None:
    """Let the norms of this model be rebuilt."""
    if model not in _models:
        _models.add(model)
        for key, (_, module, _) in list(_norms.items()):
            if module() is None:
                _norms.pop(key, None)


def _norm_of(weight: Tensor) -> tuple[nn.Module | None, dict]:
    """(the norm of a known model that owns this weight, what was proven of it)"""
    entry = _norms.get(id(weight))
    if entry is None or entry[0]() is not weight:
        key, owner = id(weight), None
        for model in list(_models):
            owner = owner or next((m for m in model.modules() if m._parameters.get("weight") is weight), None)
        forget = lambda reference: _norms.get(key, (None,))[0] is reference and _norms.pop(key, None)
        entry = weakref.ref(weight, forget), weakref.ref(owner) if owner is not None else lambda: None, {}
        _norms[key] = entry
    module = entry[1]()
    return (module, entry[2]) if module is not None and module._parameters.get("weight") is weight else (None, {})


# name of a node -> (node, saved) -> the operation on the saved tensors, or None
_PRODUCERS = {
    "NativeLayerNormBackward0": lambda node, saved: _Norm(node, saved, rms=False),
    "FusedRmsNormBackward0": lambda node, saved: _Norm(node, saved, rms=True),
    "GeluBackward0": _gelu,
    "SiluBackward0": _activation(F.silu),
    "HardswishBackward0": _activation(F.hardswish),
    "MishBackward0": _activation(F.mish),
    "MulBackward0": _product,
    "BmmBackward0": _attention,
}


def _signed(n: int) -> int:
    return n - 2**64 if n >= 2**63 else n  # nodes show negative dimensions as unsigned numbers


def _view(node, size, saved: _Saved) -> tuple:
    return (lambda x, _: x.reshape(size)), node.next_functions[0][0], tuple(node._saved_self_sym_sizes)


def _permute(node, size, saved: _Saved) -> tuple:
    dims = [_signed(d) % len(size) for d in node._saved_dims]
    before = list(size)
    for to, d in enumerate(dims):
        before[d] = size[to]
    return (lambda x, _: x.permute(dims)), node.next_functions[0][0], tuple(before)


def _transpose(node, size, saved: _Saved) -> tuple:
    a, b = (_signed(d) % len(size) for d in (node._saved_dim0, node._saved_dim1))
    before = list(size)
    before[a], before[b] = size[b], size[a]
    return (lambda x, _: x.transpose(a, b)), node.next_functions[0][0], tuple(before)


def _roll(node, size, saved: _Saved) -> tuple:
    shifts, dims = [_signed(n) for n in node._saved_shifts], [_signed(d) for d in node._saved_dims]
    return (lambda x, _: torch.roll(x, shifts, dims)), node.next_functions[0][0], size


def _clone(node, size, saved: _Saved) -> tuple:
    return (lambda x, _: x.contiguous()), node.next_functions[0][0], size


def _cast(node, size, saved: _Saved) -> tuple:
    dtype = node._input_metadata[0].dtype  # of its result, which need not be that of x
    return (lambda x, _: x.to(dtype)), node.next_functions[0][0], size


def _pad(node, size, saved: _Saved) -> tuple | None:
    # by nothing, as Swin pads images whose sides fit; the value that others pad with is not saved
    return None if any(node._saved_pad) else (None, node.next_functions[0][0], size)


def _scale(node, size, saved: _Saved) -> tuple | None:
    """A product with one saved operand, such as an RMS norm's weight or the mask of a dropout"""
    name, number = ("other", 1) if saved.has(node, "other") else ("self", 0)
    if not saved.has(node, name):
        return None
    i = saved.take(node, name, number)
    other = saved.tensors[i]
    if not other.dim() or other.dtype != saved.dtype:
        return None
    before, output = node.next_functions[1 - number]
    if before is None:
        return None
    # its own size, because the saved operand may have enlarged it
    return (lambda x, tensors: x * tensors[i]), before, tuple(before._input_metadata[output].shape)


# name of a node -> (node, size of its result, saved) -> (the operation, the node before it, the size of its input)
_MOVES = {
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
    "ReshapeAliasBackward0": _view,
    "PermuteBackward0": _permute,
    "TransposeBackward0": _transpose,
    "RollBackward0": _roll,
    "CloneBackward0": _clone,
    "ToCopyBackward0": _cast,
    "ConstantPadNdBackward0": _pad,
    "MulBackward0": _scale,
}
