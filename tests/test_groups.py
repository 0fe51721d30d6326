"""Groups: how factors start, the pairs they give, and several adapters at once."""

import dataclasses

import pytest
import torch
from models import METHODS, adapted, others, shake, vit

import efft_kernels as ek
from efft_kernels import low_rank
from efft_kernels.low_rank import stack


@pytest.mark.parametrize("zero, attn, ffn", [("v", "v", "v"), ("u", "u", "u"), ("vu", "v", "u"), ("uv", "u", "v")])
def test_exactly_one_factor_of_a_group_starts_at_zero(zero, attn, ffn):
    model = ek.inject(vit(), ek.EFFTConfig("efft2", rank=4, zero_init=zero))
    for name, letter in (("attn", attn), ("ffn", ffn)):
        assert {key for key, p in model.efft["default"][name].named_parameters() if not p.any()} == {letter}


def test_cores_start_slice_by_slice():
    """Xavier's bound is that of one P x Q core, whatever the number of cores"""
    model = ek.inject(vit(depth=12), ek.EFFTConfig("efft1", rank=16))
    sigma, bound = model.efft["default"]["all"].sigma, (6 / 32) ** 0.5
    assert len(sigma) == 36 and all(0.9 * bound < core.abs().max() <= bound for core in sigma)


def test_a_trained_scale_moves():
    model = ek.inject(vit(), ek.EFFTConfig(rank=4, scale=3.0, factor_dropout=0.0, trainable_scale=True))
    shake(model)(torch.randn(2, 3, 32, 32)).square().sum().backward()
    scales = {n: p for n, p in model.efft.named_parameters() if n.endswith("scale")}
    assert len(scales) == 2 and all(p.grad.abs() > 0 for p in scales.values())
    for group in model.efft["default"].values():
        group.reset_parameters()
        assert group.scale == 3.0


def test_lora_xs_takes_the_leading_singular_vectors():
    model = vit().double()
    weight = model.blocks[1].mlp.fc1.weight.detach().clone()
    ek.inject(model, ek.LoRAXSConfig(rank=4, targets=("fc1",)))
    group, values = model.efft["default"]["fc1"], torch.linalg.svdvals(weight)[:4]
    torch.testing.assert_close(group.a[1, 0].norm(dim=0), values)
    torch.testing.assert_close(group.a[1, 0] @ group.v[1, 0], weight.T @ group.v[1, 0].T @ group.v[1, 0])
    torch.testing.assert_close(group.v[1, 0] @ group.v[1, 0].T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_scales_of_a_stack_are_not_rounded_as_its_factors_are():
    configs = [ek.LoRAConfig(rank=4, scale=scale) for scale in (0.1, 0.3)]
    groups = [ek.inject(vit(), c, factor_dtype=torch.bfloat16).efft.groups()[0] for c in configs]
    assert stack(groups).scale.flatten().tolist() == pytest.approx([0.1, 0.3], rel=1e-6)


DROPPED = {
    f"{name}-dropped": dataclasses.replace(c, factor_dropout=0.5)
    for name, c in METHODS.items()
    if isinstance(c, ek.EFFTConfig)
}


@pytest.mark.parametrize("config", (METHODS | DROPPED).values(), ids=METHODS | DROPPED)
def test_pairs_in_the_layout_for_gpus_are_the_same(config, monkeypatch):
    """the kernels of GPUs read down with K contiguous: same values, same gradients"""
    model = adapted(config).train()
    for group in model.efft["default"].values():
        torch.manual_seed(0)
        plain = group.low_rank_pairs()
        monkeypatch.setattr(low_rank, "k_contiguous", lambda t: True)
        torch.manual_seed(0)
        turned = group.low_rank_pairs()
        monkeypatch.undo()
        probes = {path: (torch.randn_like(down), torch.randn_like(up)) for path, (down, up, *_) in plain.items()}
        parameters, grads = [p for p in group.parameters() if p is not group.magnitude], []
        for pairs in (plain, turned):
            total = sum((t * p).sum() for path in probes for t, p in zip(pairs[path][:2], probes[path]))
            grads.append(torch.autograd.grad(total, parameters))
        torch.testing.assert_close(*grads)
        for path, (down, up, *_) in turned.items():
            assert torch.equal(down, plain[path].down) and torch.equal(up, plain[path].up) and down.stride(0) == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_pair_of_one_linear_is_that_of_all(method):
    model = adapted(METHODS[method])
    for group in model.efft["default"].values():
        for path, pair in group.low_rank_pairs().items():
            (one,) = group.low_rank_pairs(path=path).values()
            torch.testing.assert_close(one, pair)


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_gives_the_pairs_of_its_groups(method):
    config = METHODS[method]
    models = [adapted(c).double() for c in (config, others(config), config)]
    for key in models[0].efft["default"]:
        groups = [model.efft["default"][key] for model in models]
        parameters = [p for group in groups for p in group.parameters() if p is not group.magnitude]
        together = stack(groups).low_rank_pairs()
        alone, probes = [group.low_rank_pairs() for group in groups], {}
        for path, (down, up, *_) in together.items():
            (N, K) = models[0].get_submodule(path).weight.shape
            assert down.shape[:2] == (3, K) and up.shape[::2] == (3, N)
            probes[path] = probe = torch.randn(3, 2, K, dtype=torch.float64), torch.randn(3, 2, N, dtype=torch.float64)
            for a, pairs in enumerate(alone):
                if (magnitude := together[path].magnitude) is not None:
                    assert torch.equal(magnitude[a], pairs[path].magnitude)
                want = probe[0][a] @ pairs[path].down @ pairs[path].up
                torch.testing.assert_close(probe[0][a] @ down[a] @ up[a], want, rtol=1e-12, atol=1e-12)
        total = lambda low: sum((x[a] @ low(p, a) * y[a]).sum() for p, (x, y) in probes.items() for a in range(3))
        got = total(lambda p, a: together[p].down[a] @ together[p].up[a])
        want = total(lambda p, a: alone[a][p].down @ alone[a][p].up)
        for g, w in zip(*(torch.autograd.grad(out, parameters) for out in (got, want))):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cores", ["per_block", "shared"])
def test_factor_dropout_of_a_stack_is_drawn_for_each_adapter(cores):
    config = ek.EFFTConfig(rank=4, scale=2.0, cores=cores, factor_dropout=0.5)
    models = [shake(ek.inject(vit().train(), config)) for _ in range(2)]
    models[1].efft["default"].load_state_dict(models[0].efft["default"].state_dict())
    for key in models[0].efft["default"]:
        pairs = stack([model.efft["default"][key] for model in models]).low_rank_pairs()
        for down, up, *_ in pairs.values():
            dropped = [(t == 0) for t in (down if (down == 0).any() else up)]
            assert 0.1 < dropped[0].double().mean() < 0.9 and not torch.equal(*dropped)


@pytest.mark.parametrize("how", ["to_empty", "assign"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_made_on_meta_computes_what_the_state_says(method, how):
    source = adapted(METHODS[method])
    with torch.device("meta"):
        model = vit()
    ek.inject(model, METHODS[method])
    if how == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), strict=True, assign=how == "assign")
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), source(x))
