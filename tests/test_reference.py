"""Plain torch in both orders of its products."""

import pytest
import torch
from accuracy import check_lowrank_linear

from efft_kernels.kernels import processor, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["product last", "product first"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_both_orders_are_right(last, bias, dtype, monkeypatch):
    orders = []
    monkeypatch.setattr(reference, "_large_product_last", lambda a, N, K: orders.append((N, K)) or last)
    M, K, N, R = 37, 48, 72, 5
    x, weight, b, down, up, dy = (
        torch.randn(size).mul_(size[-1] ** -0.5).to(dtype) for size in ((M, K), (N, K), (N,), (K, R), (R, N), (M, N))
    )
    check_lowrank_linear(reference, x, weight, b if bias else None, down, up, dy)
    assert (N, K) in orders and (K, N) in orders  # forward, and dx


@pytest.mark.parametrize("maker", ["AuthenticAMD", "GenuineIntel"])
def test_where_the_large_product_goes_last(maker, monkeypatch):
    monkeypatch.setattr(processor, "words", lambda: {maker})
    x = torch.zeros(2, 2)
    assert reference._large_product_last(x, 9, 3) == reference._large_product_last(x, 3, 9) == (maker == "GenuineIntel")
    assert not reference._large_product_last(x.bfloat16(), 9, 3)

    class OnAGpu:
        is_cuda = True

    assert reference._large_product_last(OnAGpu(), 2304, 768) and not reference._large_product_last(OnAGpu(), 768, 768)
