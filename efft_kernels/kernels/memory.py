"""Whether tensors still have their memory. C++ kernels check their own arguments; Python backends are ``checked``.

A tensor whose storage was freed or resized (FSDP, offloading) keeps its sizes. Plain torch refuses some of these with
an error that names no argument, and reads past the end of others.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

_Function = TypeVar("_Function", bound=Callable)


@functools.lru_cache(maxsize=4096)
def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """The number of entries from the first to the last"""
    return 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride))


def within(t: Tensor) -> bool:
    """Whether all entries of t are inside its storage"""
    try:
        held = t.untyped_storage().nbytes()
    except NotImplementedError:
        return True  # a kind of tensor without a storage, which cannot be freed
    size = t.numel() * t.itemsize  # nbytes cannot be read of a traced tensor
    if type(held) is not int or type(size) is not int:
        return True  # traced, with sizes that are not known yet
    if not t.is_contiguous():
        size = _extent(t.shape, t.stride()) * t.itemsize
    offset = t.storage_offset()
    return size == 0 or (offset and offset * t.itemsize) + size <= held


def check_memory(name: str, t: Tensor) -> None:
    """RuntimeError for a tensor whose storage was freed or resized"""
    if not within(t):
        raise RuntimeError(
            f"{name} must have memory for all of its entries, but its storage has {t.untyped_storage().nbytes()} "
            "bytes: it was freed or resized"
        )


def checked(*, addresses: bool = False) -> Callable[[_Function], _Function]:
    """For a function of the contract: check the memory of its tensors, which are its first arguments, at each call.

    addresses: the function reads the tensors at their addresses, so a view that is to be negated when it is read
    (``z.conj().imag``) is copied first.
    """

    def decorate(function: _Function) -> _Function:
        names = [
            name for name in inspect.signature(function).parameters if name not in ("scale", "needs", "overwrite_x")
        ]
        count = len(names)

        @functools.wraps(function)
        def run(*args):
            for t in args[:count]:
                if t is not None and not within(t):
                    check_memory(names[[a is t for a in args].index(True)], t)
            if addresses:
                args = [t.resolve_neg() if isinstance(t, Tensor) else t for t in args]
            return function(*args)

        @functools.wraps(function)
        def run_lists(*args):
            for name, tensors in zip(names, args):
                for i, t in enumerate(tensors):
                    check_memory(f"{name}[{i}]", t)
            return function(*args)

        return run_lists if names[0] == "weights" else run

    return decorate
