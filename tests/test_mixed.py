"""mixed_linear as an operator, whose values test_contract.py checks; samples do not affect each other."""

import pytest
import torch
from refusals import refuses
from torch.library import opcheck

import efft_kernels
from efft_kernels import mixed_linear
from efft_kernels.ops import dispatch

HERE = [b.name for b in efft_kernels.backends() if b.available]
if "triton" in HERE and dispatch.load("triton")[0].INTERPRETED:  # on a CPU (conftest.py)
    from interpreter import repair_bf16

    repair_bf16()


@pytest.fixture(params=HERE)
def backend(request) -> str:
    x, module = torch.randn(2, 3), dispatch.load(request.param)[0]
    if reason := module.unsupported("mixed_linear", x, x, None, x[None], x[None], torch.zeros(1)):
        pytest.skip(reason)
    return request.param


def make(B=5, T=7, K=40, N=48, R=5, A=3, dtype=torch.float32, device="cpu", grad=False):
    """x, weight, bias, down, up, ids. Samples use all adapters except the last one, and the first sample uses none."""
    shapes = (B, T, K), (N, K), (N,), (A, K, R), (A, R, N)
    tensors = [torch.randn(s, device=device).mul_(s[-1] ** -0.5).to(dtype).requires_grad_(grad) for s in shapes]
    ids = torch.arange(B, device=device) % A - 1
    return *tensors, ids


def test_gradcheck(backend, device):
    if backend == "triton":
        pytest.skip("no float64")
    *inputs, ids = make(3, 2, 5, 7, 3, 3, torch.float64, device, grad=True)
    assert torch.autograd.gradcheck(lambda *a: mixed_linear(*a, ids, backend=backend), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bitwise_reproducible(backend, device, dtype):
    def run():
        torch.manual_seed(1)
        *inputs, ids = make(9, 31, 70, 94, 6, 4, dtype, device, grad=True)
        y = mixed_linear(*inputs, ids, backend=backend)
        return y.detach(), *torch.autograd.grad(y.square().sum(), inputs)

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_gradients_of_an_unused_adapter_are_exact_zeros(backend, device):
    x, weight, bias, down, up, ids = make(device=device, grad=True)
    ddown, dup = torch.autograd.grad(mixed_linear(x, weight, bias, down, up, ids, backend=backend).sum(), (down, up))
    assert not ddown[2].any() and not dup[2].any() and all(ddown[a].any() and dup[a].any() for a in (0, 1))


def test_nan_stays_within_its_sample_and_adapter(backend, device):
    x, weight, bias, down, up, _ = make(B=6, T=9, A=4, device=device)
    ids = torch.tensor([0, 1, -1, 0, 2, -1], device=device)
    clean = [t.clone().requires_grad_() for t in (x, down, up)]
    dirty = [t.clone() for t in (x, down, up)]
    dirty[0][1], dirty[0][5] = float("nan"), float("inf")  # the sample of adapter 1, and one without an adapter
    dirty[1][2], dirty[2][2], dirty[1][3] = float("nan"), float("inf"), float("nan")
    dirty, results = [t.requires_grad_() for t in dirty], []
    for x, down, up in (clean, dirty):
        y = mixed_linear(x, weight, bias, down, up, ids, backend=backend)
        dy = torch.ones_like(y)
        dy[5] = float("nan") if x is dirty[0] else 1
        results.append([y, *torch.autograd.grad(y, (x, down, up), dy)])
    for want, got, same in zip(*results, ([0, 2, 3], [0, 2, 3], [0, 3], [0, 3])):
        assert torch.equal(want[same], got[same])
    y2, _, _, dup2 = results[1]
    assert not y2[[1, 4, 5]].isfinite().all(2).any() and not dup2[1].isfinite().any()


def test_ids_of_any_stride(backend, device):
    *inputs, ids = make(device=device, grad=True)
    results = []
    for same in (ids, torch.stack([ids, ids + 5], 1)[:, 0], ids.flip(0).clone().flip(0)):
        y = mixed_linear(*inputs, same, backend=backend)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    assert all(torch.equal(t, first) for other in results[1:] for t, first in zip(other, results[0]))


def test_rows_of_any_rank_and_windows(backend, device):
    x, weight, bias, down, up, ids = make(B=4, T=6, A=3, device=device)
    y = mixed_linear(x, weight, bias, down, up, ids, backend=backend)
    for shape in ((4, 2, 3, 40), (8, 3, 40), (24, 40)):
        again = mixed_linear(x.view(shape), weight, bias, down, up, ids, backend=backend)
        assert again.shape == (*shape[:-1], 48) and torch.equal(again.view_as(y), y)
    for empty in (x[:, :0], x[:0]):
        few = ids[: len(empty)]
        inputs = [t.clone().requires_grad_() for t in (empty, weight, bias, down, up)]
        y = mixed_linear(*inputs, few, backend=backend)
        assert y.shape == (*empty.shape[:2], 48)
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), inputs))


def test_autocast_casts_all_but_the_ids(backend):
    if backend == "triton":
        pytest.skip("Triton's interpreter has no bfloat16")
    inputs = make(grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixed_linear(*inputs, backend=backend)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs[:5])


def test_saves_only_what_the_gradients_read(backend):
    for i in range(5):
        *tensors, ids = make()
        tensors[i].requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
            y = mixed_linear(*tensors, ids, backend=backend)
        y.sum().backward()
        assert (tensors[0].shape in saved) == (i in (1, 3)) and ((35, 5) in saved) == (i == 4)
        assert all((t.grad is None) != (j == i) for j, t in enumerate(tensors))


@pytest.mark.slow
def test_opcheck(backend, device):
    x, weight, bias, down, up, ids = make(device=device, grad=True)
    names = torch.ops.efft_kernels
    opcheck(names.mixed_linear.default, (x, weight, bias, down, up, ids, backend))
    opcheck(names.mixed_linear.default, (x.detach().flatten(0, 1), weight.detach(), None, down, up, ids, backend))
    dy, p = torch.randn(5, 7, 48, device=device), torch.randn(35, 5, device=device)
    plain = [t.detach() for t in (dy, x, weight, down, up, p, ids)]
    for needs in ([True] * 5, [True, False, False, True, True], [False] * 4 + [True]):
        opcheck(names.mixed_linear_backward.default, (*plain, needs, backend))


def test_compiles_without_graph_breaks(backend):
    if backend == "triton":
        pytest.skip("Triton's interpreter cannot be compiled")
    torch._dynamo.reset()
    call = lambda *a: mixed_linear(*a, backend=backend).relu()
    compiled, inputs = torch.compile(call, fullgraph=True, backend="aot_eager"), make(grad=True)
    y, want = compiled(*inputs), call(*inputs)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), inputs[:5]) for out in (y, want)))


@pytest.mark.parametrize(
    "name, value, error, says",
    [
        ("ids", torch.tensor([0, 1, 2, 0, 3]), ValueError, "ids must be from -1 to 2 for 3 adapters, got 0 to 3"),
        ("ids", torch.tensor([0, 1, -2, 0, 1]), ValueError, "ids must be from -1 to 2 for 3 adapters, got -2 to 1"),
        ("ids", torch.tensor([0, 1, 2]), ValueError, "the rows of x must be a multiple of the 3 ids, got 35"),
        ("ids", torch.tensor([]).long(), ValueError, "the rows of x must be a multiple of the 0 ids, got 35"),
        ("ids", torch.tensor([[0] * 5]), ValueError, r"ids must be \[B\], got \[1, 5\]"),
        ("ids", torch.zeros(5), TypeError, "ids must be int64, got torch.float32"),
        ("ids", torch.ones(5).bool(), TypeError, "ids must be int64, got torch.bool"),
        ("ids", 0, TypeError, "ids must be a torch.Tensor, got int"),
        ("ids", torch.arange(5, device="meta"), ValueError, "ids must be on the device of x, cpu, got meta"),
        ("down", torch.randn(3, 39, 5), ValueError, r"down must be \[40, R\]"),
        ("down", torch.randn(40, 5), ValueError, r"down must be \[A, K, R\]"),
        ("down", make()[3].double(), TypeError, "down must have the dtype of x, torch.float32, got torch.float64"),
        ("up", torch.randn(2, 5, 48), ValueError, r"up must be \[3, 5, N\]"),
        ("up", torch.randn(3, 5, 47), ValueError, r"up must be \[5, 48\]"),
    ],
)
def test_bad_arguments_are_named(name, value, error, says):
    given = dict(zip(("x", "weight", "bias", "down", "up", "ids"), make()))
    refuses(error, says, mixed_linear, **given | {name: value})
