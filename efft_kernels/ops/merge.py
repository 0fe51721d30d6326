"""merge_: weight += (down @ up).T in place, for many weights at once."""

import torch
from torch import Tensor

from ..kernels.memory import check_memory
from ..precision import LOW
from .checks import check_floats, check_product, check_shape, check_tensors
from .dispatch import check_backend, register, select
from .overlap import repeats, sharing


def _check(weights, downs, ups, like) -> None:
    """like: has the dtype and device that downs and ups must have"""
    if not len(weights) == len(downs) == len(ups):
        lengths = f"{len(weights)}, {len(downs)}, {len(ups)}"
        raise ValueError(f"weights, downs and ups must be of equal length, got {lengths}")
    for i, (weight, down, up) in enumerate(zip(weights, downs, ups)):
        check_floats("weights[0]", weights[0], **{f"weights[{i}]": weight})
        check_floats("weights[0]" if like is weights[0] else "downs[0]", like, **{f"downs[{i}]": down, f"ups[{i}]": up})
        check_shape(f"weights[{i}]", weight, "N", "K")
        check_shape(f"downs[{i}]", down, weight.shape[1], "R")
        check_shape(f"ups[{i}]", up, down.shape[1], weight.shape[0])
        check_product(f"weights[{i}]", weight, *weight.shape)
        for name, t in (("weights", weight), ("downs", down), ("ups", up)):
            check_memory(f"{name}[{i}]", t)
        if repeats(weight):
            raise ValueError(
                f"weights[{i}] must have an address for each value, got an expanded or overlapping tensor with strides "
                f"{weight.stride()}"
            )
    read = {f"{name}[{i}]": t for name, tensors in (("downs", downs), ("ups", ups)) for i, t in enumerate(tensors)}
    if shared := sharing({f"weights[{i}]": weight for i, weight in enumerate(weights)}, read):
        raise ValueError(
            "weights must be distinct from each other and from what is read, but {} and {} share memory".format(*shared)
        )


def _merge(weights, downs, ups, backend=None):
    _check(weights, downs, ups, weights[0] if weights else None)
    if weights:
        select("merge_", backend, *weights, *downs, *ups).merge_(weights, downs, ups)
        torch.autograd.graph.increment_version(weights)  # kernels write through pointers, which autograd does not see


def _merge_fake(weights, downs, ups, backend=None):
    return None


_op = register(
    "merge_(Tensor(a!)[] weights, Tensor[] downs, Tensor[] ups, str? backend=None) -> ()", _merge, _merge_fake
)


def merge_(
    weights: list[Tensor],  # each [N, K]
    downs: list[Tensor],  # each [K, R]
    ups: list[Tensor],  # each [R, N]
    *,
    backend: str | None = None,
) -> None:
    """weight += (down @ up).T, in place, for all of them in one call and without a dense update tensor.

    Sums run in float32 (float64 for float64) and are rounded once to the dtype of the weight. A bfloat16 or float16
    weight cannot hold most of a small update: where that matters, merge into float32.

    Args:
        weights, downs, ups: lists of equal length, one dtype and one device; the sizes may differ from entry to entry.
            Beside bfloat16 or float16 weights downs and ups may be float32: each weight is then merged by itself,
            through a float32 copy, so that nothing but the sum is rounded.
        backend: as in :func:`group_update`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`group_update`, before anything is written.
    """
    weights, downs, ups = list(weights), list(downs), list(ups)
    for what, tensors in (("weights", weights), ("downs", downs), ("ups", ups)):
        check_tensors(**{f"{what}[{i}]": t for i, t in enumerate(tensors)})
    if backend is not None:
        check_backend(backend)
    for i, weight in enumerate(weights):
        if not torch.compiler.is_compiling() and weight.is_neg():  # which a compiler cannot trace
            raise ValueError(f"weights[{i}] must hold its values, got a view that is negated when it is read")
    with torch.no_grad():
        if weights and downs and weights[0].dtype in LOW and downs[0].dtype == torch.float32:
            _check(weights, downs, ups, downs[0])
            for weight, down, up in zip(weights, downs, ups):
                wide = weight.float()
                _op([wide], [down], [up], backend)
                weight.copy_(wide)
            return
        _op(weights, downs, ups, backend)
