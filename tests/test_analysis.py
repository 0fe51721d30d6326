"""Subspace similarity against its formula, known subspaces and random controls; costs against a hand count."""

import math

import pytest
import torch
from models import LOW_RANK, METHODS, images, shake, timm, vit
from refusals import refuses
from torch.utils.flop_counter import FlopCounterMode

import efft_kernels as ek
from efft_kernels.analysis import cost, subspace_map, subspace_similarity, updates
from efft_kernels.low_rank import Group


def formula(a, b, i, j):
    """The same number computed another way: eigenvectors of A A.T, and a sum over single cosines."""
    left = torch.linalg.eigh(a.double() @ a.double().mT)[1].flip(1)
    right = torch.linalg.eigh(b.double() @ b.double().mT)[1].flip(1)
    return sum((left[:, p] @ right[:, q]).item() ** 2 for p in range(i) for q in range(j)) / min(i, j)


@pytest.mark.parametrize("i, j", [(1, 1), (3, 7), (7, 3), (9, 9)])
def test_similarity_is_the_formula(i, j):
    a, b = torch.randn(20, 9), torch.randn(20, 30)
    assert subspace_similarity(a, b, i, j) == pytest.approx(formula(a, b, i, j), abs=1e-10)


def test_known_subspaces():
    axes = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    sizes = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64).diag()
    a = axes[:, :4] @ sizes @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    turned = axes[:, [1, 0, 6, 7]] @ sizes
    assert subspace_similarity(a, a, 3, 3) == pytest.approx(1)
    assert subspace_similarity(a, a, 2, 4) == pytest.approx(1)  # the smaller lies in the larger
    # the first two directions are a's second and first, the others orthogonal
    want = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 2 / 3, 2 / 3], [1, 1, 2 / 3, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(subspace_map(a, turned), want, rtol=0, atol=1e-9)
    assert subspace_similarity(a, axes[:, 6:9] + 0 * a[:, :3], 4, 3) == pytest.approx(0, abs=1e-20)


def test_map_holds_every_similarity():
    a, b = torch.randn(15, 6), torch.randn(15, 5)
    found = subspace_map(a, b)
    assert found.shape == (6, 5) and found.dtype == torch.float64
    for i in range(1, 7):
        for j in range(1, 6):
            assert found[i - 1, j - 1].item() == pytest.approx(subspace_similarity(a, b, i, j), abs=1e-12)
    assert torch.equal(subspace_map(a, b, 2, 3), found[:2, :3])


def test_gaussian_control():
    # of i and j random directions in d, i j / d of squared cosines is expected: phi = max(i, j) / d
    d, i, j = 200, 10, 40
    found = [subspace_similarity(torch.randn(d, d), torch.randn(d, d), i, j) for _ in range(10)]
    assert sum(found) / len(found) == pytest.approx(j / d, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_pair_is_its_product(dtype):
    down, up, b = torch.randn(30, 4).to(dtype), torch.randn(4, 50).to(dtype), torch.randn(30, 6)
    product = down.double() @ up.double()
    torch.testing.assert_close(subspace_map((down, up), b), subspace_map(product, b, 4), rtol=0, atol=1e-9)


def test_rank_is_where_the_directions_end():
    a = torch.randn(20, 3) @ torch.randn(3, 10)
    assert subspace_map(a, a).shape == (3, 3)
    wide = torch.randn(20, 5), torch.cat([torch.randn(2, 9), torch.zeros(3, 9)])
    assert subspace_map(wide, a).shape == (2, 3)
    refuses(ValueError, "i must be from 1 to the rank of a, which is 3, got 4", subspace_similarity, a, a, 4, 1)
    refuses(ValueError, "j must be from 1 to the rank of b, which is 3, got 0", subspace_similarity, a, a, 1, 0)
    refuses(ValueError, "which is 0", subspace_map, torch.zeros(4, 4), torch.eye(4))


def test_bad_matrices():
    eye, pair = torch.eye(4), (torch.ones(4, 2), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"a must be a matrix \[d, n\] or a pair .* got \(4,\)"):
        subspace_similarity(torch.ones(4), eye, 1, 1)
    refuses(ValueError, r"b must be a matrix .* got \(4, 2\), \(3, 4\)", subspace_similarity, eye, pair, 1, 1)
    refuses(ValueError, "a and b must have as many rows, got 4 and 5", subspace_similarity, eye, torch.eye(5), 1, 1)
    refuses(ValueError, "a must be finite", subspace_similarity, eye / 0, eye, 1, 1)


@pytest.mark.parametrize("name", LOW_RANK)
def test_updates_are_what_merging_adds(name, monkeypatch):
    model = shake(ek.inject(vit(embed_dim=48, num_heads=3).double(), METHODS[name])).train()
    seen, pairs = set(), Group.low_rank_pairs
    modes = lambda: seen.update(group.training for group in model.efft.groups())
    monkeypatch.setattr(Group, "low_rank_pairs", lambda *given: modes() or pairs(*given))
    found = updates(model)
    assert model.efft.training and seen == {True}, "another thread may train meanwhile"
    before = {path: model.get_submodule(path).weight.detach().clone() for path, _ in found}
    parts = {path: slot.site.parts for g in model.efft.groups() for path, slot in g.slots.items()}
    ek.merge(model)
    for path, weight in before.items():
        added = (model.get_submodule(path).weight - weight).mT.chunk(len(parts[path]), 1)
        for part, columns in zip(parts[path], added):
            if (path, part) not in found:
                assert not columns.any()
                continue
            down, up = found[path, part]
            torch.testing.assert_close(down @ up, columns, rtol=0, atol=1e-12)
            assert not down.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranks_in_16_bits(dtype):
    left, right = torch.randn(768, 16).to(dtype), torch.randn(16, 768).to(dtype)
    assert subspace_map((left, right), (left @ right).to(dtype)).shape == (16, 16)
    for wrong in ([[1.0]], torch.eye(4, dtype=torch.int64)):
        refuses(TypeError, "b must be floating-point tensors, got", subspace_similarity, (left, right), wrong, 1, 1)


def test_updates_need_adapters():
    refuses(ValueError, "must have adapters", updates, vit())
    refuses(ValueError, "those of dora=True, which scales W, are not", updates, ek.inject(vit(), METHODS["lora-dora"]))


def test_cost_of_vit_b():
    with torch.device("meta"):
        model = timm().create_model("vit_base_patch16_224")
    d, blocks, rows, r = 768, 12, 197, 16
    efft2 = cost(ek.plan(model, ek.EFFTConfig("efft2", rank=r)), rows)
    assert efft2.parameters == 7 * d * r + 6 * blocks * r * r
    assert efft2.frozen_parameters == 12 * blocks * d * d
    assert efft2.flops == 2 * rows * 12 * blocks * d * d and efft2.train_flops == 2 * efft2.flops
    assert efft2.adapter_flops == 2 * rows * r * blocks * ((d + 3 * d) + (d + d) + 2 * (d + 4 * d))
    assert efft2.adapter_train_flops == 3 * efft2.adapter_flops
    assert efft2.update_flops == 2 * r * r * blocks * (4 * d + 2 * 4 * d)
    assert (efft2.bytes, efft2.adapter_bytes) == (4 * efft2.frozen_parameters, 4 * efft2.parameters)
    half = cost(ek.plan(model, ek.EFFTConfig("efft2", rank=r)), rows, torch.bfloat16)
    assert half.bytes * 2 == efft2.bytes
    lora = cost(ek.plan(model, ek.LoRAConfig(rank=8)), rows)
    # q and v of the fused projection: x [A_q, A_v] and 2 x 8 rows of its 3 d columns
    assert lora.adapter_flops == 2 * rows * blocks * 16 * (d + 3 * d) and lora.update_flops == 0


@pytest.mark.parametrize("name", METHODS)
def test_cost_counts_what_is_injected(name):
    plan, model = ek.plan(vit(), METHODS[name]), ek.inject(vit(), METHODS[name])
    pairs = {path: pair for g in model.efft.groups() for path, pair in g.low_rank_pairs("reference").items()}
    x, found = images(2), cost(plan, 2 * vit().pos_embed.shape[1])
    with torch.no_grad(), FlopCounterMode(display=False) as adapted:
        model.eval()(x)
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        vit().eval()(x)
    # the norms of W are no matrix product, which alone are counted
    norms = sum(2 * down.shape[-2] * up.shape[-1] for down, up, _, magnitude in pairs.values() if magnitude is not None)
    assert found.adapter_flops + found.update_flops - norms == adapted.get_total_flops() - plain.get_total_flops()
    found = cost(plan, 5)
    assert found.adapter_flops == sum(2 * 5 * (down.numel() + up.numel()) for down, up, *_ in pairs.values())
    assert found.parameters == sum(p.numel() for p in model.efft.parameters())


@pytest.mark.parametrize("rows", [0, -1, 2.0, None, math.inf])
def test_bad_rows(rows):
    refuses(ValueError, "rows must be an int of at least 1", cost, ek.plan(vit(), METHODS["efft2"]), rows)
