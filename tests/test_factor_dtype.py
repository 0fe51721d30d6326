"""Factors are float32 beside bfloat16 and float16 weights: they train, are cast once a forward, and merge exactly."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import LOW_RANK, METHODS, PLAIN, adapted, images, shake, vit
from refusals import refuses
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import random_unstructured
from torch.utils._python_dispatch import TorchDispatchMode

import efft_kernels as ek
from efft_kernels.serving import AdapterBank

LOW = [torch.bfloat16, torch.float16]


def dtypes(model) -> set:
    return {t.dtype for t in (*model.efft.parameters(), *model.efft.buffers())}


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_factors_are_float32_beside_low_weights_and_compute_what_the_weights_dtype_would(method, dtype):
    wide, model = adapted(METHODS[method]), ek.inject(vit().to(dtype), METHODS[method])
    assert dtypes(model) == {torch.float32}
    model.efft.load_state_dict(wide.efft.state_dict())
    low = copy.deepcopy(model)
    for group in low.efft["default"].values():
        group.floor = dtype
    low.efft.to(dtype)
    x = images(dtype=dtype)
    y = model(x)
    assert dtypes(low) == {dtype} and y.dtype == dtype
    torch.testing.assert_close(y, low(x), rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    grads = [p.grad for p in model.efft.parameters()]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("autocast", [False, True])
def test_at_most_a_twentieth_of_the_entries_stand_still_in_a_bfloat16_model(autocast):
    torch.manual_seed(0)
    model = ek.inject(vit(num_classes=4).bfloat16().train(), ek.EFFTConfig(rank=8, scale=1.0, factor_dropout=0.0))
    factors = list(model.efft.parameters())
    optimizer = torch.optim.AdamW(ek.adapter_parameters(model), 1e-5, weight_decay=1e-4)
    x = images(8, dtype=torch.bfloat16)
    for _ in range(3):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in factors]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x).float(), torch.arange(8) % 4)
        loss.backward()
        optimizer.step()
    with_gradient = sum((p.grad != 0).sum().item() for p in factors)
    still = sum(((p == b) & (p.grad != 0)).sum().item() for p, b in zip(factors, before))
    assert still <= 0.05 * with_gradient
    assert all(t.dtype == torch.float32 for p in factors for t in optimizer.state[p].values() if t.dim())


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("cpu", torch.float16)])
def test_casting_a_model_leaves_the_factors_as_precise_as_they_were(cast):
    model = adapted()
    before = {key: p.detach().clone() for key, p in model.efft.named_parameters()}
    model.efft.default.attn.u.grad = torch.ones_like(model.efft.default.attn.u)
    cast(model)
    assert model.blocks[0].attn.qkv.weight.dtype in LOW
    assert all(torch.equal(p, before[key]) for key, p in model.efft.named_parameters())
    assert model.efft.default.attn.u.grad.dtype == torch.float32
    layer = ek.EFFTLinear(8, 8, rank=2)
    layer.u.grad = torch.ones_like(layer.u)
    random_unstructured(weight_norm(layer, "v"), "sigma", 0.5)
    cast(layer)
    assert layer.weight.dtype in LOW and layer.bias.dtype in LOW
    assert {p.dtype for p in (layer.u, layer.u.grad, layer.sigma_orig, layer.v)} == {torch.float32}
    assert layer(torch.randn(3, 8, dtype=layer.weight.dtype)).dtype == layer.weight.dtype


def test_float64_models_have_float64_factors():
    assert dtypes(ek.inject(vit().double(), PLAIN)) == {torch.float64}
    assert dtypes(adapted().double()) == {torch.float64} and dtypes(adapted().double().float()) == {torch.float32}
    assert ek.EFFTLinear(8, 8, rank=2, dtype=torch.float64).u.dtype == torch.float64
    layer = ek.EFFTLinear(8, 8, rank=2, bias=False)
    layer.load_state_dict({"weight": layer.weight.double()}, strict=False, assign=True)  # and not the factors
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 8, dtype=torch.float64)).dtype == torch.float64


def test_another_factor_dtype():
    model = ek.inject(vit().bfloat16(), PLAIN, factor_dtype=torch.bfloat16)
    assert dtypes(model) == dtypes(model.bfloat16()) == {torch.bfloat16}
    ek.add_adapter(model, PLAIN, "wide", factor_dtype=torch.float32)
    assert {p.dtype for p in model.efft["wide"].parameters()} == {torch.float32}
    for weights in (torch.float32, torch.bfloat16):
        for factors in (torch.bfloat16, torch.float64):
            shaken = shake(ek.inject(vit().to(weights), PLAIN, factor_dtype=factors))
            assert dtypes(shaken) == {factors} and shaken(images(dtype=weights)).dtype == weights
            layer = ek.EFFTLinear(8, 8, rank=2, dtype=weights, factor_dtype=factors)
            layer(torch.randn(2, 8, dtype=weights)).sum().backward()
            assert layer.v.grad.dtype == factors
    for bad in (torch.int8, "float32", None):
        refuses(TypeError, "factor_dtype must be", ek.inject, vit(), PLAIN, factor_dtype=bad)
        refuses(TypeError, "factor_dtype must be", ek.EFFTLinear, 8, 8, rank=2, factor_dtype=bad)
        refuses(TypeError, "factor_dtype must be", AdapterBank, vit(), factor_dtype=bad)


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_has_the_dtype_of_its_factors_and_loading_casts_up(tmp_path, factors):
    path = tmp_path / "a.safetensors"
    model = shake(ek.inject(vit().bfloat16(), PLAIN, factor_dtype=factors))
    ek.save_adapter(model, path)
    assert {t.dtype for key, t in load_file(path).items() if not key.startswith("head/")} == {factors}
    loaded = ek.load_adapter(vit().bfloat16(), path)
    assert dtypes(loaded) == {torch.float32}
    for key, p in loaded.efft.named_parameters():
        assert torch.equal(p, model.efft.get_parameter(key).float())
    assert dtypes(ek.load_adapter(vit(), path, factor_dtype=torch.bfloat16)) == {torch.bfloat16}
    model.efft["default"]["attn"].u.data[0] = 1e6
    ek.save_adapter(model, tmp_path / "large")
    with pytest.raises(ValueError, match="attn.u has NaN or infinity in float16"):
        ek.load_adapter(vit(), tmp_path / "large", factor_dtype=torch.float16)
    base = vit().bfloat16()
    bank, narrow = AdapterBank(copy.deepcopy(base)), AdapterBank(base, factor_dtype=torch.bfloat16)
    bank.add("a", path)
    narrow.add("a", path)
    wide, lean = ([p for g in b._adapters["a"].groups.values() for p in g.parameters()] for b in (bank, narrow))
    assert {p.dtype for p in wide} == {torch.float32}
    assert 2 * sum(p.nbytes for p in lean) == sum(p.nbytes for p in wide)
    x = images(dtype=torch.bfloat16)
    with bank.use(["a", None]):
        y = bank.model(x)
    with narrow.use(["a", None]):
        assert torch.equal(narrow.model(x), y), "factors rounded when loaded or when used: the same numbers"
    y.float().sum().backward()
    assert {p.grad.dtype for p in wide} == {torch.float32}


class Casts(TorchDispatchMode):
    """counts casts between dtypes"""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op._schema.name == "aten::_to_copy"
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", LOW_RANK)
def test_casts_do_not_grow_with_the_number_of_linears(method, autocast):
    counts = []
    for depth in (2, 3):
        made = vit(depth=depth) if autocast else vit(depth=depth).bfloat16()
        model = shake(ek.inject(made, METHODS[method])).train()
        x, context = images(dtype=model.head.weight.dtype), torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with torch.no_grad(), context, ek.disable_adapter(model), Casts() as plain:
            model(x)
        with context, Casts() as casts:
            model(x)
        counts.append(casts.count - plain.count)
    groups = len(model.efft["default"])
    assert 0 < counts[0] == counts[1] <= 4 * groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["efft1", "efft2-scale", "fact-tk", "lora-all", "lora-xs"])
def test_merge_rounds_the_sum_alone_also_under_autocast(method, dtype):
    model = ek.inject(vit().to(dtype), METHODS[method])
    shake(model)
    before = {path: m.weight.detach().float().clone() for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    updates = {
        path: (pair.down.float() @ pair.up.float()).T
        for group in model.efft.groups()
        for path, pair in group.pairs_without_dropout().items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        if dtype == torch.float32:
            ek.merge(model)
        else:
            with pytest.warns(UserWarning, match="to rounding"):
                ek.merge(model)
    for path, update in updates.items():
        want, weight = before[path] + update, model.get_submodule(path).weight
        tolerance = dict(rtol=1e-6, atol=1e-7) if dtype == torch.float32 else dict(rtol=2**-8, atol=0)
        torch.testing.assert_close(weight.float(), want, **tolerance)
        if dtype != torch.float32:  # the nearest bfloat16 number, but for ties
            assert (weight == want.bfloat16()).float().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_of_a_layer_under_autocast(dtype):
    layer = ek.EFFTLinear(64, 64, rank=4, dtype=dtype)
    nn.init.normal_(layer.v)
    want = layer.weight.float() + (layer.u @ layer.sigma[0] @ layer.v).T
    with torch.autocast("cpu", torch.bfloat16):
        merged = layer.merge()
    assert merged.weight.dtype == dtype
    torch.testing.assert_close(merged.weight, want.to(dtype), rtol=2**-7 if dtype != torch.float32 else 1e-6, atol=1e-6)
    assert (merged.weight.float() - want).norm() < (1e-6 if dtype == torch.float32 else 2**-9) * want.norm()


def test_reset_parameters_initialises_the_factors():
    layer = ek.EFFTLinear(16, 12, rank=2, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(float("nan"))
    layer.reset_parameters()
    x = torch.randn(3, 16)
    assert not any(p.isnan().any() for p in layer.parameters())
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_one_graph_casts_the_factors_too(autocast):
    model = adapted().train()
    model = model if autocast else model.bfloat16()
    x, context = images(dtype=model.head.weight.dtype), torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with context:
        want, got = model(x), torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(got, want)
    got.float().sum().backward()
    assert model.efft.default.attn.v.grad.dtype == torch.float32
