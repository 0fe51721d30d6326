"""Operands of the tests of kernels: sizes near 1 in value, and every layout in memory."""

import torch


def poison(monkeypatch):
    """Memory that no kernel writes is nan, or an integer that is no index and no address, and never zero by luck."""
    empty = torch.empty

    def poisoned(*size, **options):
        found = empty(*size, **options)
        return found.fill_(float("nan") if found.is_floating_point() else torch.iinfo(found.dtype).min)

    monkeypatch.setattr(torch, "empty", poisoned)


def make(M, K, N, R, dtype=torch.float32, device="cpu"):
    """Returns x, weight, bias, down, up, dy."""
    sizes = (M, K), (N, K), (N,), (K, R), (R, N), (M, N)
    return [torch.randn(s, device=device).mul_(s[-1] ** -0.5).to(dtype) for s in sizes]


def make_mixed(B, T, K, N, R, A, dtype, device="cpu"):
    """Returns x, weight, bias, down, up, ids, dy; the last adapter has no sample, some samples have no adapter."""
    x, weight, bias, _, _, dy = make(B * T, K, N, R, dtype, device)
    down, up = (torch.randn(s, device=device).mul_(s[1] ** -0.5).to(dtype) for s in ((A, K, R), (A, R, N)))
    return x, weight, bias, down, up, torch.arange(B, device=device) * 7 % A - 1, dy


def within(rows, cols, dtype, device="cpu", left=3):
    """A slice of a wider buffer that is nan elsewhere."""
    buffer = torch.full((rows + 4, cols + 9), float("nan"), dtype=dtype, device=device)
    buffer[1 : 1 + rows, left : left + cols] = torch.randn(rows, cols, device=device).mul_(cols**-0.5).to(dtype)
    return buffer[1 : 1 + rows, left : left + cols]


# CUDA copies eight numbers at a time where rows are aligned to 16 bytes, and one otherwise; weight, down and up have
# either orientation.
LAYOUTS = {
    "aligned": lambda rows, cols, *at: within(rows, -(-cols // 8) * 8 + 7, *at, left=8)[:, :cols],
    "slices": within,
    "transposed": lambda rows, cols, *at: within(cols, rows, *at).t(),
    "turned": lambda rows, cols, *at: torch.randn(cols, rows, device=at[1]).mul_(cols**-0.5).to(at[0]).t(),
    "steps": lambda rows, cols, *at: within(2 * rows, 3 * cols, *at)[::2, ::3],
    "repeated": lambda rows, cols, *at: within(1, cols, *at).expand(rows, cols),
}
