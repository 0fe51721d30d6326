"""EFFTLinear as a module: its values and gradients, and everything that users do with modules."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from refusals import refuses
from torch import nn
from torch.utils.checkpoint import checkpoint

import efft_kernels
from efft_kernels import EFFTLinear

HERE = [b.name for b in efft_kernels.backends() if b.available and b.name in ("reference", "cpu")]


@pytest.fixture(params=[None, *HERE], ids=lambda b: b or "auto")
def backend(request):
    return request.param


def trained(layer: EFFTLinear) -> EFFTLinear:
    """Give every factor random values, so that no update is zero."""
    with torch.no_grad():
        for factor in factors(layer):
            factor.copy_(torch.randn_like(factor) * 0.3)
    return layer


def make(backend=None, K=24, N=36, **options) -> EFFTLinear:
    options = dict(rank=4, slices=3, scale=2.0) | options
    return trained(EFFTLinear(K, N, backend=backend, **options))


def dense(layer: EFFTLinear, x):
    up = torch.cat([core @ layer.v for core in layer.sigma], dim=1)
    return F.linear(x, layer.weight, layer.bias) + layer.scale * (x @ layer.u @ up)


def factors(layer):
    return [layer.u, layer.sigma, layer.v]


def test_equals_the_dense_formula(backend):
    layer, x = make(backend).double(), torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-12, atol=1e-12)


def test_a_new_layer_changes_nothing(backend):
    for zero in ("v", "u"):
        linear, x = nn.Linear(24, 36), torch.randn(5, 24)
        layer = EFFTLinear.from_linear(linear, rank=4, zero_init=zero, backend=backend)
        torch.testing.assert_close(layer(x), linear(x))
        assert [f.abs().sum() == 0 for f in factors(layer)] == [zero == "u", False, zero == "v"]
        trained(layer).reset_parameters()
        assert [f.abs().sum() == 0 for f in factors(layer)] == [zero == "u", False, zero == "v"]


def test_cores_are_drawn_slice_by_slice():
    layer, bound = EFFTLinear(64, 64 * 12, rank=16, slices=12), (6 / (16 + 16)) ** 0.5
    assert 0.9 * bound < layer.sigma.abs().amax(dim=(1, 2)).min() and layer.sigma.abs().max() <= bound


def test_trains_the_factors_and_nothing_else():
    layer = make()
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["u", "sigma", "v"]
    assert [tuple(f.shape) for f in factors(layer)] == [(24, 4), (3, 4, 4), (4, 12)]
    assert set(layer.state_dict()) == {"weight", "bias", "u", "sigma", "v"}
    assert "in_features=24, out_features=36, bias=True, rank=4, scale=2.0, slices=3" in repr(layer)
    assert "rank=(2, 5)" in repr(EFFTLinear(24, 36, rank=(2, 5)))


def test_from_linear_adopts_the_parameters():
    linear = nn.Linear(24, 36).to(torch.bfloat16).eval()
    weight, bias = linear.weight, linear.bias
    layer = EFFTLinear.from_linear(linear, rank=(2, 5))
    assert layer.weight is weight and layer.bias is bias and not weight.requires_grad and not bias.requires_grad
    assert not layer.training and all(f.dtype == torch.float32 for f in factors(layer))
    assert EFFTLinear.from_linear(nn.Linear(3, 4, bias=False), rank=1).bias is None


def test_merge_gives_a_plain_linear(backend):
    layer, x = make(backend), torch.randn(5, 24)
    before, linear = copy.deepcopy(layer.state_dict()), layer.eval().merge()
    assert type(linear) is nn.Linear and not linear.training and linear.weight is not layer.weight
    torch.testing.assert_close(linear(x), dense(layer, x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.merge().weight, linear.weight)
    linear.weight.data.add_(1), linear.bias.data.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.weight.requires_grad_()
    assert [p.requires_grad for p in layer.merge().parameters()] == [True, False]
    assert make(backend, bias=False).merge().bias is None


def test_factor_dropout(backend):
    layer, x = make(backend, factor_dropout=0.5), torch.randn(5, 24)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second), "a fresh mask per call"
    torch.manual_seed(3)
    assert torch.equal(layer(x), first), "reproducible from the seed"
    torch.testing.assert_close(layer.eval()(x), dense(layer, x))
    merged, layer.factor_dropout = layer.merge(), 0.0
    assert torch.equal(merged.weight, layer.merge().weight), "merging never drops"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank=0), "rank must be an int or a pair of ints from 1 to 12, got 0"),
        (dict(rank=13), "rank must be an int or a pair of ints from 1 to 12, got 13"),
        *((dict(rank=rank), "rank must be") for rank in ((2, 3, 4), 2.0, True)),
        (dict(slices=5), "slices must be a positive divisor of out_features=36, got 5"),
        *((dict(slices=slices), "slices must be") for slices in (0, True)),
        (dict(backend="fast"), "backend must be one of"),
        (dict(factor_dropout=1.0), r"factor_dropout must be a number in \[0, 1\), got 1.0"),
        (dict(factor_dropout="a"), r"factor_dropout must be a number in \[0, 1\), got 'a'"),
        (dict(scale=float("nan")), "scale must be finite, got nan"), (dict(scale=1e39), "scale must be in the range"),
        (dict(zero_init="w"), "zero_init must be 'v' or 'u', got 'w'"),
    ],
    ids=str,
)  # fmt: skip
def test_refuses(options, message):
    linear = nn.Linear(24, 36)
    refuses(ValueError, message, EFFTLinear, 24, 36, **dict(rank=4, slices=3) | options)
    refuses(ValueError, message, EFFTLinear.from_linear, linear, **dict(rank=4, slices=3) | options)
    assert linear.weight.requires_grad, "nothing is half-done after an error"
    refuses(ValueError, "in_features must be an int of at least 1, got True", EFFTLinear, True, 36)


def test_from_linear_refuses_what_is_not_a_plain_linear():
    says = "linear must be an nn.Linear, not a subclass, got NonDynamicallyQuantizableLinear"
    refuses(TypeError, says, EFFTLinear.from_linear, nn.MultiheadAttention(8, 2).out_proj)
    refuses(TypeError, "got Conv1d", EFFTLinear.from_linear, nn.Conv1d(3, 4, 1))
    normed = nn.Linear(8, 8)
    torch.nn.utils.parametrizations.weight_norm(normed)
    refuses(TypeError, "linear must be an nn.Linear, not a subclass, got Parametrized", EFFTLinear.from_linear, normed)


def test_two_forwards_before_two_backwards(backend):
    layer, a, b = make(backend), torch.randn(3, 24), torch.randn(5, 24)
    losses = lambda f: (f(a).square().sum(), f(b).sum())
    for loss in losses(layer):
        loss.backward()
    want = torch.autograd.grad(sum(losses(lambda x: dense(layer, x))), factors(layer))
    torch.testing.assert_close([f.grad for f in factors(layer)], list(want), rtol=1e-4, atol=1e-4)


def test_no_grad_and_inference_mode(backend):
    layer, x = make(backend), torch.randn(70, 24)
    want = dense(layer, x).detach()
    with torch.no_grad():
        assert not layer(x).requires_grad
        torch.testing.assert_close(layer(x), want)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), want)
        made_inside = make(backend)  # its parameters have no version counter
        torch.testing.assert_close(made_inside(x), dense(made_inside, x))
        made_inside.weight.mul_(2)
        torch.testing.assert_close(made_inside(x), dense(made_inside, x))
    torch.testing.assert_close(layer(x), want)


def test_checkpointing(backend):
    layer, x = make(backend, factor_dropout=0.3), torch.randn(5, 24, requires_grad=True)
    torch.manual_seed(0)
    want = torch.autograd.grad(layer(x).square().sum(), [x, *factors(layer)])
    for reentrant in (False, True):
        torch.manual_seed(0)
        y = checkpoint(layer, x, use_reentrant=reentrant)
        layer.zero_grad()
        x.grad = None
        y.square().sum().backward()
        assert all(torch.equal(t.grad, w) for t, w in zip([x, *factors(layer)], want))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compile(backend, mode):
    torch._dynamo.reset()
    # in float64, because compiled and eager may associate the products in different ways
    layer = make(backend).double().train(mode == "train")
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    inputs = [x, *factors(layer)]
    torch.testing.assert_close(*(torch.autograd.grad(f(x).square().sum(), inputs) for f in (compiled, layer)))
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x.float()), layer(x.float()))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numpy_scalars_compile(kind):
    torch._dynamo.reset()
    layer, x = make(scale=kind(2), slices=np.int64(3), factor_dropout=kind(0.5)), torch.randn(5, 24)
    assert layer.eval().extra_repr().endswith("scale=2.0, slices=3")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    layer.train()
    torch.manual_seed(0)
    want = layer(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x), want)


def test_export():
    layer, x = make().eval(), torch.randn(2, 5, 24)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    more = torch.randn(7, 5, 24)
    torch.testing.assert_close(program.module()(more), layer(more))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    layer, x = make(backend), torch.randn(5, 24)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    got, want = (torch.autograd.grad(t.float().mean(), factors(layer)) for t in (y, dense(layer, x)))
    for g, w in zip(got, want):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, w, rtol=0.02, atol=0.02)


def test_to_dtype_deepcopy_pickle_and_state_dict(backend):
    layer, x = make(backend), torch.randn(70, 24)
    want = layer(x)
    assert layer.to(torch.float64)(x.double()).dtype == torch.float64
    layer = layer.to(torch.float32)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), want)
        twin.weight.data.zero_()
        assert torch.equal(layer(x), want), "a copy shares nothing"
    other = EFFTLinear(24, 36, rank=4, slices=3, scale=2.0, backend=backend)
    other(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), want)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.device("meta"):
        empty = EFFTLinear(24, 36, rank=4, slices=3, scale=2.0, backend=backend)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), want)


def test_load_state_dict_and_weight_edits_between_steps(backend):
    layer, x = make(backend, K=96, N=96), torch.randn(200, 96)
    for _ in range(2):  # the second round runs with whatever a kernel cached of the weight
        torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-4, atol=1e-4)
        layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})
        torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-4, atol=1e-3)
        with torch.no_grad():
            layer.weight.mul_(-1)
        torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-4, atol=1e-3)
        layer.weight.data.mul_(0.5)
        torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-4, atol=1e-3)
        layer.weight = nn.Parameter(torch.randn(96, 96), requires_grad=False)
        torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-4, atol=1e-3)


def test_unfrozen_weight_and_bias(backend):
    layer, x = make(backend), torch.randn(70, 24)
    layer.requires_grad_(True)
    inputs = [layer.weight, layer.bias, *factors(layer)]
    optimizer = torch.optim.SGD(inputs, lr=1e-3)
    for _ in range(2):
        loss, want = layer(x).square().sum(), torch.autograd.grad(dense(layer, x).square().sum(), inputs)
        optimizer.zero_grad()
        loss.backward()
        torch.testing.assert_close([t.grad for t in inputs], list(want), rtol=1e-3, atol=1e-2)
        optimizer.step()


def test_training_finds_an_update_of_its_rank():
    layer, x = EFFTLinear(24, 36, rank=4), torch.randn(64, 24)
    target = (layer(x) + x @ torch.randn(24, 4) @ torch.randn(4, 36) / 10).detach()
    optimizer, losses = torch.optim.AdamW(factors(layer), lr=1e-2), []
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph():
    layer, x = make().cuda(), torch.randn(64, 24, device="cuda")
    graphed = torch.cuda.make_graphed_callables(layer, (x.clone().requires_grad_(),))
    torch.testing.assert_close(graphed(x), dense(layer, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["weight", "bias", "sigma"])
def test_parametrized_tensors_are_read_through_their_parametrization(name):
    layer, x = make(), torch.randn(5, 24)
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        getattr(changed, name).mul_(2)
    torch.nn.utils.parametrize.register_parametrization(layer, name, Doubled())
    torch.testing.assert_close(layer(x), changed(x))


class Doubled(torch.nn.Module):
    def forward(self, t):
        return 2 * t
