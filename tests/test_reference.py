"""Plain torch in both orders of its products, whose results test_contract.py checks."""

import pytest
import torch
from accuracy import check_lowrank_linear
from operands import make

from efft_kernels.kernels import processor, reference


def test_forward_and_dx_ask_for_the_order(monkeypatch):
    orders = []
    monkeypatch.setattr(reference, "_large_product_last", lambda a, N, K: orders.append((N, K)) or True)
    check_lowrank_linear(reference, *make(37, 48, 72, 5, torch.float32))
    assert {(72, 48), (48, 72)} <= {*orders}


@pytest.mark.parametrize("maker", ["AuthenticAMD", "GenuineIntel"])
def test_where_the_large_product_goes_last(maker, monkeypatch):
    monkeypatch.setattr(processor, "words", lambda: {maker})
    x = torch.zeros(2, 2)
    assert reference._large_product_last(x, 9, 3) == reference._large_product_last(x, 3, 9) == (maker == "GenuineIntel")
    assert not reference._large_product_last(x.bfloat16(), 9, 3)

    class OnAGpu:
        is_cuda = True

    assert reference._large_product_last(OnAGpu(), 2304, 768) and not reference._large_product_last(OnAGpu(), 768, 768)
