"""Which tensors share memory, entry by entry: what is written in place must share none."""

import math

import torch
from torch import Tensor


def repeats(t: Tensor) -> bool:
    """Whether two entries of a matrix have one address"""
    (rows, columns), (row, column) = t.shape, t.stride()
    if rows == 1 or columns == 1:
        return (rows > 1 and row == 0) or (columns > 1 and column == 0)
    if row == 0 or column == 0:
        return t.numel() > 0
    # entries are i * row + j * column; the nearest that may coincide are column / g rows and row / g columns apart
    g = math.gcd(row, column)
    return column // g < rows and row // g < columns


def _span(t: Tensor) -> tuple[int, int]:
    """The addresses of the first byte and of the first one behind the last"""
    start = t.data_ptr()
    return start, start + t.itemsize * (1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride())))


def share_memory(written: Tensor, other: Tensor) -> bool:
    """Whether a byte belongs to both. ``written`` has no two entries at one address."""
    (first, end), (start, _) = _span(written), _span(other)
    base = min(first, start)
    bytes_of = torch.zeros(max(end, _span(other)[1]) - base, dtype=torch.bool)

    def of(t: Tensor, at: int) -> Tensor:
        return bytes_of.as_strided((*t.shape, t.itemsize), (*(step * t.itemsize for step in t.stride()), 1), at - base)

    of(written, first).fill_(True)
    return bool(of(other, start).any())


def sharing(written: dict[str, Tensor], read: dict[str, Tensor]) -> tuple[str, str] | None:
    """The names of a tensor that is written and of another that shares memory with it, or None"""
    spans = sorted(
        (*_span(t), name) for name, t in (written | read).items() if t.numel() and t.data_ptr() and not t.is_meta
    )
    open_spans = []
    for start, end, name in spans:
        open_spans = [(other_end, other) for other_end, other in open_spans if other_end > start]
        for _, other in open_spans:
            first, second = (name, other) if name in written else (other, name)
            if first in written and share_memory(written[first], (written | read)[second]):
                return first, second
        open_spans.append((end, name))
    return None
