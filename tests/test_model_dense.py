"""Whole models against the formula of the paper: y = x W + dW with a dense dW, built from the factors by hand."""

import copy
import dataclasses

import pytest
import torch
from models import METHODS, biased, images, shake, swin, vit

import efft_kernels as ek
from efft_kernels.kernels import reference

ATTENTION = ("q", "k", "v", "proj")


def update_of(group, site, part):
    """dW [d_in, d_out] of one matrix, each output times its factor where outputs have one."""
    update, channels = unscaled_update_of(group, site, part), dict(group.named_parameters()).get("channel_scale")
    return update if channels is None else update * channels[group.channels[site.path, part]]


def unscaled_update_of(group, site, part):
    """dW without these factors, by a separate formula for each method."""
    config, numbers = group.config, dict([*group.named_parameters(), *group.named_buffers()])
    scale = numbers.get("scale", config.scale)
    if config.rank_stabilized:
        scale = scale / group.rank**0.5
    if isinstance(config, ek.EFFTConfig):
        u, sigma, v = numbers["u"], numbers["sigma"], numbers["v"]
        attention = part in ATTENTION
        key = "attn" if attention and config.variant == "efft1" else part
        number = group.order.index(key if config.cores == "shared" else (site.block, key))
        core = sigma[number]
        if "rank_weights" in numbers:  # a coefficient for each column of a core
            core = core @ numbers["rank_weights"][number].diag()
        dense = scale * u @ core @ v
        if attention and config.variant == "efft1":
            d, i = site.width, ATTENTION.index(part)
            dense = dense[:, i * d : (i + 1) * d]
        return dense.T if part == "fc2" else dense
    if isinstance(config, ek.FacTConfig):
        u, v = numbers["u"], numbers["v"]
        sigma = numbers["sigma"] if "sigma" in numbers else torch.einsum("sk,kpq->spq", numbers["p"], numbers["c"])
        if "rank_weights" in numbers:
            sigma = sigma * numbers["rank_weights"].unsqueeze(1)
        n = {"fc1": site.width // len(u), "fc2": site.in_features // len(u)}.get(part, 1)
        first = sum(count for key, count in group.order[: [key for key, _ in group.order].index((site.block, part))])
        slices = [scale * u @ sigma[first + i] @ v for i in range(n)]
        return torch.cat(slices, 0 if part == "fc2" else 1)
    row, column = group.order.index((site.block, part)) // len(site.chosen), site.chosen.index(part)
    if isinstance(config, (ek.LoRAConfig, ek.LoRAXSConfig)):
        a = numbers["a"][row, column]
        if "rank_weights" in numbers:
            a = a @ numbers["rank_weights"][row, column].diag()
        if isinstance(config, ek.LoRAXSConfig):
            return scale * a @ numbers["sigma"][row, column] @ numbers["v"][row, column]
        return scale * a @ numbers["b"][row, column]
    assert isinstance(config, ek.VeRAConfig)
    d, b = numbers["d"][row, column], numbers["b"][row, column]
    return scale * numbers["u"] @ d.diag() @ numbers["v"] @ b.diag()


def changed(rows, group, site, part):
    """W + dW [N, K], with DoRA each row of it at its magnitude over a norm that is a constant in the backward"""
    rows = rows + update_of(group, site, part).T
    if not getattr(group.config, "dora", False):
        return rows
    magnitude = dict(group.named_parameters())["magnitude"][group.channels[site.path, part]]
    return (magnitude / rows.detach().norm(dim=1)).unsqueeze(1) * rows


class Numbers:
    """A group's factors, and the matrix of each core, found from the order of the model's Linears alone."""

    def __init__(self, group, config):
        self.config, self.named_parameters, self.named_buffers = config, group.named_parameters, group.named_buffers
        keys = [(s.site.block, part) for s in group.spec.slots for part in s.site.parts if part in s.site.chosen]
        if isinstance(config, ek.EFFTConfig):
            if config.variant == "efft1":
                keys = [(block, "attn" if part in ATTENTION else part) for block, part in keys]
            keys = list(dict.fromkeys(part if config.cores == "shared" else (block, part) for block, part in keys))
        if isinstance(config, ek.FacTConfig):
            keys = [(key, 4 if key[1] in ("fc1", "fc2") else 1) for key in keys]
        self.order, self.rank = keys, group.spec.rank[1 if group.spec.zero == "v" else 0]
        self.channels, first = {}, 0  # (path, part) -> its entries of channel_scale
        for slot in group.spec.slots:
            for part in (part for part in slot.site.parts if part in slot.site.chosen):
                self.channels[slot.site.path, part] = slice(first, first + slot.site.width)
                first += slot.site.width


def dense(base, injected, config, x):
    """The output of the base model with dW added to its weights; differentiable in the factors."""
    weights = {}
    for group in injected.efft["default"].values():
        numbers = Numbers(group, config)
        for slot in group.spec.slots:
            name, site = f"{slot.site.path}.weight", slot.site
            parts = zip(base.get_parameter(name).detach().unflatten(0, (len(site.parts), site.width)), site.parts)
            made = [changed(rows, numbers, site, part) if part in site.chosen else rows for rows, part in parts]
            weights[name] = torch.cat(made)
    return torch.func.functional_call(base, weights, x)


DORA = {
    f"{name}, dora": dataclasses.replace(METHODS[name], dora=True)
    for name in ("efft1", "efft2-scale", "fact-tt", "fact-tk", "lora-all", "lora-options", "lora-xs")
}
OPTIONS = {
    f"{name}, options": dataclasses.replace(METHODS[name], rank_weights=True, channel_scale=True, rank_stabilized=True)
    for name in ("efft1", "efft2", "efft2-shared", "fact-tt", "fact-tk", "lora-all", "lora-xs")
}


@pytest.mark.parametrize("make", [vit, swin])
@pytest.mark.parametrize("method", [*METHODS, *DORA, *OPTIONS])
def test_outputs_and_gradients_equal_the_dense_formula(make, method):
    base, config = biased(make().double()), (METHODS | DORA | OPTIONS)[method]
    model = shake(ek.inject(copy.deepcopy(base), config))
    factors, x = list(model.efft.parameters()), images(dtype=torch.float64)
    want, got = dense(base, model, config, x), model(x)
    assert (want - base(x)).abs().max() > 1e-3 * want.abs().max(), "the updates must matter"
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()
    # the same layer by layer, outside the model's forward
    alone = model.forward_head(model.forward_features(x))
    assert (alone - want).abs().max() <= 1e-12 * want.abs().max()

    wanted = torch.autograd.grad(want.square().sum(), factors)
    for output in (got, alone):
        for grad, exact in zip(torch.autograd.grad(output.square().sum(), factors), wanted):
            assert (grad - exact).abs().max() <= 1e-10 * exact.abs().max()


GATED = dict(embed_dim=48, num_heads=2, patch_size=16)  # one Linear holds gate and fc1, so that calls differ in cores


@pytest.mark.parametrize(
    "make", [vit, swin, lambda: vit("vit_giant_patch14_dinov2", **GATED)], ids=["vit", "swin", "gated"]
)
@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("efft")])
def test_factor_dropout_that_drops_nothing_changes_nothing(make, method):
    """Factor dropout computes the updates by another path; with a probability of 1e-15 both must agree."""
    if make not in (vit, swin) and method.startswith("efft1"):
        pytest.skip("the FFN of this model is not 4 x width, as EFFT1 needs it")
    base, config = make().double(), METHODS[method]
    model = shake(ek.inject(base, dataclasses.replace(config, factor_dropout=1e-15)))
    x, factors = images(dtype=torch.float64), list(model.efft.parameters())
    plain, drawn = model.eval()(x), model.train()(x)
    torch.testing.assert_close(drawn, plain, rtol=1e-10, atol=1e-12)
    alone = model.forward_head(model.forward_features(x))
    torch.testing.assert_close(alone, plain, rtol=1e-10, atol=1e-12)
    wanted = torch.autograd.grad(plain.square().sum(), factors)
    for output in (drawn, alone):
        torch.testing.assert_close(torch.autograd.grad(output.square().sum(), factors), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", [vit, swin])
@pytest.mark.parametrize("method", METHODS)
def test_at_the_start_outputs_are_bit_equal_to_the_base(make, method, monkeypatch):
    # the same product of x and W on both sides: where oneDNN leads, the reference rounds as oneDNN does
    monkeypatch.setattr(reference, "_onednn_leads", lambda: False)
    model, x = make(), images()
    before = model(x)
    ek.inject(model, METHODS[method], backend="reference")
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("make", [vit, swin])
@pytest.mark.parametrize("method", METHODS)
def test_merge_rounds_and_unmerge_restores_every_bit(make, method):
    model = biased(make())
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    shake(ek.inject(model, METHODS[method]))
    x = images()
    before = model(x)
    ek.merge(model)
    assert model.state_dict().keys() == weights.keys()
    assert all(type(m) is torch.nn.Linear for m in model.modules() if isinstance(m, torch.nn.Linear))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    ek.unmerge(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    assert torch.equal(model(x), before)
