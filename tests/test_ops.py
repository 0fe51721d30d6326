"""The operators: values, gradients, tracing, autocast, backend choice and refusals."""

import math
import os
import sys

import numpy as np
import pytest
import torch
import torch._dynamo.compiled_autograd
import torch.nn.functional as F
from refusals import refuses
from torch.library import opcheck

import efft_kernels
from efft_kernels import efft_linear, group_update, lowrank_linear, merge_, mixed_linear
from efft_kernels.kernels import cpu, decisions, reference
from efft_kernels.ops import dispatch, few_rows

HERE = [b.name for b in efft_kernels.backends() if b.available and b.name in ("reference", "cpu")]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=HERE)
def backend(request) -> str:
    return request.param


@pytest.fixture
def device(backend) -> str:
    return "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"


def make(M=37, K=40, N=48, R=5, dtype=torch.float32, device="cpu", grad=False):
    shapes = (M, K), (N, K), (N,), (K, R), (R, N)
    return [torch.randn(s, device=device).mul_(s[-1] ** -0.5).to(dtype).requires_grad_(grad) for s in shapes]


def test_gradcheck(backend, device):
    x, weight, bias, down, up = make(6, 5, 7, 3, torch.float64, device, grad=True)
    assert torch.autograd.gradcheck(lambda *a: lowrank_linear(*a, backend=backend), (x, weight, bias, down, up))
    r = lambda *size: torch.randn(size, dtype=torch.float64, device=device, requires_grad=True)
    sigma, v, u, wide = r(2, 3, 4), r(4, 5), r(5, 3), r(10, 5).detach()
    assert torch.autograd.gradcheck(lambda *a: group_update(*a, 1.5, backend=backend), (sigma, v))
    run = lambda x, *factors: efft_linear(x, wide, None, *factors, 0.7, backend=backend)
    assert torch.autograd.gradcheck(run, (x, u, sigma, v))


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6), (17, 6)], ids=str)
@pytest.mark.parametrize("slices", [None, 3])
@pytest.mark.parametrize("ways", [("kernel", "kernel"), ("kernel", "torch"), ("torch", "kernel"), ("torch", "torch")])
def test_efft_linear_of_a_few_rows(shape, slices, ways, monkeypatch):
    """From left to right or by way of sigma v: the same y and gradients."""
    monkeypatch.setattr(cpu, "for_few_rows", lambda x, weight, backward: ways[backward])
    called = []
    for name, way in zip(("few_rows", "few_rows_backward"), ways):
        module = (cpu, reference)[way == "torch"]
        computes = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, f=computes, n=name: called.append(n) or f(*given))
    r = lambda *s: torch.randn(*s, dtype=torch.float64, requires_grad=True)
    x, u, v, sigma = r(*shape), r(6, 2), r(4, 5), r(*([slices] if slices else []), 2, 4)
    weight, bias = torch.randn(5 * (slices or 1), 6, dtype=torch.float64), torch.randn(5 * (slices or 1)).double()
    ys = [efft_linear(x, weight, bias, u, sigma, v, 0.7, backend=backend) for backend in (None, "reference")]
    assert called == ["few_rows"] * (shape[0] != 17)
    torch.testing.assert_close(*ys)
    ys[0].add_(1)  # y is the caller's own
    at = 0, max(0, ys[0].dim() - 2)
    dy, leaves = torch.randn_like(ys[0]).transpose(*at).contiguous().transpose(*at), (x, u, sigma, v)
    got, want = (torch.autograd.grad(y, leaves, dy) for y in ys)
    assert called == ["few_rows", "few_rows_backward"] * (shape[0] != 17)
    for i, (a, b) in enumerate(zip(got, want)):
        torch.testing.assert_close(a, b)
        only = [t.detach().requires_grad_(i == j) for j, t in enumerate(leaves)]
        y = efft_linear(only[0], weight, bias, *only[1:], 0.7)
        assert torch.equal(torch.autograd.grad(y, only[i], dy)[0], a)
    assert few_rows._fit(x, weight, bias, u, sigma, v) and not few_rows._fit(x[..., 1:], weight, bias, u, sigma, v)
    for trained in ((weight.clone().requires_grad_(), bias), (weight, bias.clone().requires_grad_())):
        assert few_rows.take(x, *trained, u, sigma, v, 0.7, None) is None  # which has no gradient for these
    monkeypatch.setattr(few_rows, "default_backend", lambda: "reference")  # EFFT_BACKEND says what computes
    assert few_rows.take(x, weight, bias, u, sigma, v, 0.7, None) is None


def test_a_few_rows_under_compiled_autograd_and_within_autocast(monkeypatch):
    shapes = (2, 6), (5, 6), (6, 2), (2, 4), (4, 5)
    given = [torch.randn(s, requires_grad=s != (5, 6)) for s in shapes]
    run = lambda backend: efft_linear(*given[:2], None, *given[2:], 0.7, backend=backend).square().sum()
    want = torch.autograd.grad(run("reference"), [t for t in given if t.requires_grad])
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        run(None).backward()
    torch.testing.assert_close([t.grad for t in given if t.requires_grad], list(want))
    monkeypatch.setattr(cpu, "for_few_rows", lambda *_: "torch")
    y = run(None)
    with torch.autocast("cpu", torch.bfloat16):  # of the backward alone
        torch.testing.assert_close(torch.autograd.grad(y, [t for t in given if t.requires_grad]), want)


def test_slices_side_by_side_are_a_view(backend):
    up = group_update(torch.randn(3, 4, 5), torch.randn(5, 8), backend=backend)
    assert up.transpose(0, 1).flatten(1).data_ptr() == up.data_ptr()


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (2, 2, 3, 40), (0, 40), (2, 0, 40)], ids=str)
def test_x_of_any_rank_and_empty(backend, shape):
    _, weight, bias, down, up = make(grad=True)
    x = torch.randn(shape, requires_grad=True)
    y = lowrank_linear(x, weight, bias, down, up, backend=backend)
    expected = F.linear(x, weight, bias) + (x @ down) @ up
    torch.testing.assert_close(y, expected)
    got, want = (torch.autograd.grad(out.sum(), (x, weight, bias, down, up)) for out in (y, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_only_the_gradients_that_are_asked_for(backend, monkeypatch):
    asked, module = [], dispatch.load(backend)[0]
    honest = module.lowrank_linear_backward
    spy = lambda *args: asked.append((args[1] is None, args[5] is None, list(args[6]))) or honest(*args)
    monkeypatch.setattr(module, "lowrank_linear_backward", spy)
    for i in range(5):
        tensors = make()
        tensors[i].requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = lowrank_linear(*tensors, backend=backend)
        y.sum().backward()
        no_x, no_p, needs = asked.pop()
        assert needs == [j == i for j in range(5)]
        assert no_x == (i not in (1, 3)) and no_p == (i != 4), "activations are held only where a gradient reads them"
        assert all((t.grad is None) != (j == i) for j, t in enumerate(tensors))
        shapes = [t.shape for t in saved]
        assert ((37, 40) in shapes) == (i in (1, 3)) and ((37, 5) in shapes) == (i == 4)


@pytest.mark.parametrize("op", ["group", "linear", "mixed"])
def test_the_result_may_be_changed_in_place(backend, op):
    x, weight, bias, down, up = make(grad=True)
    rows = x.detach().expand(2, 3, *x.shape).flatten(1, 2)
    ids = torch.zeros(2, dtype=torch.long)
    run = {
        "group": lambda: group_update(down[None], up, backend=backend),
        "mixed": lambda: mixed_linear(rows, weight, bias, down[None], up[None], ids, backend=backend),
        "linear": lambda: lowrank_linear(rows, weight, bias, down, up, backend=backend),
    }[op]
    grads = [torch.autograd.grad(f(run()).square().sum(), (down, up)) for f in (torch.relu, torch.relu_)]
    assert all(torch.equal(*pair) for pair in zip(*grads))


@pytest.mark.parametrize("few_rows", [False, True])
@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_are_refused(backend, few_rows, power):
    """also of a loss that is linear in y, and where named leaves need no part of dy; and batches of gradients"""
    if few_rows:
        leaves = [torch.randn(size, requires_grad=True) for size in ((3, 6), (6, 2), (3, 2, 4), (4, 5))]
        x, *factors = leaves
        y = efft_linear(x, torch.randn(15, 6), None, *factors)
    else:
        leaves = x, _, _, down, up = make(grad=True)
        y = lowrank_linear(*leaves, backend=backend)
    says, batch = "a backward of efft_kernels supports neither torch.func", torch.ones(power, *y.shape)
    refuses(RuntimeError, says, torch.autograd.grad, y, x, batch, retain_graph=True, is_grads_batched=True)
    grads = torch.autograd.grad(y.pow(power).sum(), leaves, create_graph=True)
    for grad in grads:
        if grad.requires_grad:  # that of a bias does not depend on anything
            refuses(RuntimeError, "differentiable once", grad.sum().backward, retain_graph=True)
            again = lambda of: torch.autograd.grad(of.sum(), leaves, retain_graph=True, allow_unused=True)
            refuses(RuntimeError, "differentiable once", again, grad)
    if not few_rows and power == 2:
        y = lowrank_linear(x, *(t.detach() for t in leaves[1:]), backend=backend)  # dx depends on dy alone
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        refuses(RuntimeError, "differentiable once", dx.sum().backward)


def test_saved_tensors_are_guarded_against_in_place_edits(backend):
    x, weight, bias, down, up = make(grad=True)
    y = lowrank_linear(x, weight, bias, down, up, backend=backend)
    with torch.no_grad():
        up.mul_(2)
    refuses(RuntimeError, "modified by an inplace operation", y.sum().backward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_of_the_contribution_is_below_half_a_percent(backend, dtype):
    # with weight zero the result is the adapter's contribution and nothing else
    x, weight, _, down, up = make(197, 768, 768, 16, dtype)
    y = lowrank_linear(x, torch.zeros_like(weight), None, down, up, backend=backend)
    exact = x.double() @ down.double() @ up.double()
    assert torch.linalg.norm(y.double() - exact) <= 0.005 * torch.linalg.norm(exact)


def test_contribution_survives_beside_a_large_weight():
    # one accumulator: the adapter's part is rounded once, with the sum, and is right on average over many entries
    x, weight, _, down, up = make(256, 256, 256, 8, torch.bfloat16)
    up = up * 0.01
    base = x.double() @ weight.double().T
    part = x.double() @ down.double() @ up.double()
    y = lowrank_linear(x, weight, None, down, up).double()
    assert abs(((y - base) * part).sum() / part.square().sum() - 1) < 0.05


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merge_rounds_once(backend, dtype):
    sizes = [(7, 9, 2), (48, 40, 5), (33, 64, 17)]
    weights = [torch.randn(N, K).to(dtype) for N, K, _ in sizes]
    downs = [torch.randn(R, K).to(dtype).t() for _, K, R in sizes]
    ups = [torch.randn(R, N + 4).to(dtype)[:, 2:-2] for N, _, R in sizes]
    exact = [w.double() + (d.double() @ u.double()).T for w, d, u in zip(weights, downs, ups)]
    versions = [w._version for w in weights]
    merge_(weights, downs, ups, backend=backend)
    for weight, want, version in zip(weights, exact, versions):
        assert weight._version > version
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(weight.double(), want, rtol=ulp, atol=16 * ulp)
        if dtype in (torch.bfloat16, torch.float16):  # float32 sums: nearly always the correctly rounded value
            assert (weight == want.to(dtype)).double().mean() > 0.98


def test_merge_refuses_before_it_writes(backend):
    weights = [torch.randn(4, 5), torch.randn(4, 5)]
    before = [w.clone() for w in weights]
    downs, ups = [torch.randn(5, 2)] * 2, [torch.randn(2, 4), torch.randn(3, 4)]
    refuses(ValueError, r"ups\[1\] must be \[2, 4\], got \[3, 4\]", merge_, weights, downs, ups, backend=backend)
    refuses(ValueError, "weights must be distinct", merge_, [weights[0]] * 2, downs, [ups[0]] * 2, backend=backend)
    refuses(ValueError, "equal length, got 2, 1, 1", merge_, weights, downs[:1], ups[:1], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(weights, before))
    merge_([], [], [], backend=backend)
    merge_(torch.zeros(2, 8, 4), torch.zeros(2, 4, 2), torch.zeros(2, 2, 8), backend=backend)  # stacked
    one = dict(downs=downs[:1], ups=ups[:1], backend=backend)
    repeated, negated = torch.zeros(1, 5).expand(4, 5), torch.zeros(4, 5, dtype=torch.complex64).conj().imag
    refuses(ValueError, r"weights\[0\] must have an address for each value", merge_, [repeated], **one)
    refuses(ValueError, r"weights\[0\] must hold its values, got a view that is negated", merge_, [negated], **one)
    refuses(TypeError, r"downs\[0\] must be a torch.Tensor, got int", merge_, weights[:1], **one | {"downs": [1]})


@pytest.mark.slow
def test_opcheck(backend):
    names = torch.ops.efft_kernels
    x, weight, bias, down, up = make(grad=True)
    opcheck(names.lowrank_linear.default, (x, weight, bias, down, up, backend))
    opcheck(names.lowrank_linear.default, (x.detach()[None], weight.detach(), None, down, up, backend))
    sigma, v = torch.randn(3, 2, 4, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    opcheck(names.group_update.default, (sigma, v, 1.5, backend))
    plain = [t.detach() for t in (torch.randn(37, 48), x, weight, down, up, torch.randn(37, 5))]
    for needs in ([True] * 5, [True, False, False, True, True], [False] * 4 + [True]):
        opcheck(names.lowrank_linear_backward.default, (*plain, needs, backend))
    given = torch.randn(3, 2, 6), sigma.detach(), v.detach(), 1.5, [True, True]
    opcheck(names.group_update_backward.default, (*given, backend))
    opcheck(names.merge_.default, ([weight.detach().clone()], [down.detach()], [up.detach()], backend))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_forward_and_gradients(backend, dynamic):
    def run(x, weight, bias, u, sigma, v):
        return efft_linear(x * 2, weight, bias, u, sigma, v, 3.0, backend=backend).relu()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager" if dynamic else "inductor")
    weight, bias = torch.randn(24, 10), torch.randn(24)
    for rows in (6, 9):
        x, u = torch.randn(2, rows, 10, requires_grad=True), torch.randn(10, 3, requires_grad=True)
        sigma, v = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, 12, requires_grad=True)
        inputs = (x, u, sigma, v)
        y, want = compiled(x, weight, bias, u, sigma, v), run(x, weight, bias, u, sigma, v)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), inputs) for out in (y, want)))


def test_autocast(backend):
    for dtype in (torch.bfloat16, torch.float16):
        tensors = make(grad=True)
        with torch.autocast("cpu", dtype):
            y = lowrank_linear(*tensors, backend=backend)
            up = group_update(torch.randn(2, 3, 4), torch.randn(4, 5), backend=backend)
        assert y.dtype == up.dtype == dtype
        torch.testing.assert_close(y, lowrank_linear(*[t.to(dtype) for t in tensors], backend=backend), rtol=0, atol=0)
        y.float().sum().backward()
        assert all(t.grad.dtype == torch.float32 and t.grad.abs().sum() > 0 for t in tensors)
    # float64 is not an autocast dtype, and a backward inside the region computes in the dtype of the forward
    with torch.autocast("cpu", torch.bfloat16):
        assert lowrank_linear(*make(dtype=torch.float64), backend=backend).dtype == torch.float64
        assert lowrank_linear(*make(device="meta")).dtype == torch.float32  # of another device than autocast's
        x, weight, *rest = make()
        assert lowrank_linear(x, weight.to(torch.float8_e4m3fn), *rest, backend=backend).dtype == torch.bfloat16
    tensors = make(grad=True)
    y = lowrank_linear(*tensors, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


def test_plain_calls_go_past_the_dispatcher(backend, monkeypatch):
    refuse = lambda *args: pytest.fail("the dispatcher costs the host as much as the call")
    for name in ("lowrank_linear", "group_update", "mixed_linear"):
        module = sys.modules[f"efft_kernels.ops.{name}"]
        monkeypatch.setattr(module._call, "op", refuse)
        monkeypatch.setattr(module, "below_autograd", refuse)
    for autocast in (False, True):
        x, weight, bias, down, up = make(grad=True)
        v = up.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = lowrank_linear(x, weight, bias, down, group_update(torch.eye(len(up))[None], v, backend=backend)[0])
            y = y + mixed_linear(x, weight, bias, down[None], up[None], torch.zeros(len(x), dtype=torch.int64))
        y.float().sum().backward()
        assert all(t.grad.abs().sum() > 0 for t in (x, weight, bias, down, up, v))


def test_tensors_that_outlive_a_transform_are_tensors():
    sigma, v, left = torch.randn(1, 3, 4, requires_grad=True), torch.randn(4, 5), []
    torch.func.grad(lambda v: (left.append(v * 2), v.sum())[1])(v)
    torch.testing.assert_close(group_update(sigma, left[0]), group_update(sigma, v * 2))


def test_the_op_on_meta_tensors_computes_no_values(backend):
    with torch.no_grad():
        y, p = torch.ops.efft_kernels.lowrank_linear(*make(device="meta"), backend)
    assert y.shape == (37, 48) and p.shape == (37, 5) and y.is_meta


def test_backends_says_what_and_why():
    found = {b.name: b for b in efft_kernels.backends()}
    assert set(found) == {"reference", "cpu", "triton", "cuda"}
    assert found["reference"].available and found["reference"].automatic
    assert all(b.note and str(b).startswith(b.name) for b in found.values())
    assert found["cpu"].available, found["cpu"].note


def test_decisions_are_forgotten_before_they_are_too_many(monkeypatch):
    monkeypatch.setattr(dispatch, "_REMEMBERED", 3)
    decisions.clear()
    for rows in range(1, 10):
        lowrank_linear(*make(rows))
    assert 0 < len(decisions) <= 3


def test_a_named_backend_works_or_says_why(monkeypatch):
    tensors = make()
    refuses(ValueError, r"backend must be one of \[.*\] or None, got 'fast'", lowrank_linear, *tensors, backend="fast")
    monkeypatch.setattr(reference, "unsupported", lambda *a: "of a planted reason")
    decisions.clear()
    says = "backend 'reference' cannot run lowrank_linear here: of a planted reason"
    refuses(RuntimeError, says, lowrank_linear, *tensors, backend="reference")


def test_the_environment_names_a_backend(monkeypatch):
    seen, honest = [], reference.lowrank_linear
    monkeypatch.setattr(reference, "lowrank_linear", lambda *a: seen.append(1) or honest(*a))
    monkeypatch.setattr(dispatch, "default_backend", lambda: os.environ["EFFT_BACKEND"])  # read at every call
    monkeypatch.setenv("EFFT_BACKEND", "reference")
    decisions.clear()
    lowrank_linear(*make(512, 512, 512, 16))
    assert seen
    monkeypatch.setenv("EFFT_BACKEND", "none such")
    decisions.clear()
    refuses(ValueError, "none such", lowrank_linear, *make())


def test_an_unproven_or_slower_backend_is_not_chosen(monkeypatch):
    cpu, tensors = dispatch.load("cpu")[0], make(512, 512, 512, 16)
    monkeypatch.setattr(cpu, "slower", lambda *a, **b: None)  # what it says depends on the processor
    assert dispatch.select("lowrank_linear", None, *tensors) is cpu
    for question in ("unproven", "unavailable", "unsupported", "slower"):
        with monkeypatch.context() as patch:
            patch.setattr(cpu, question, lambda *a, **b: "of a planted reason")
            dispatch.candidates.cache_clear()
            assert dispatch.select("lowrank_linear", None, *tensors) is reference
        dispatch.candidates.cache_clear()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.randn(3, 41)), ValueError, r"x must be \[..., 40\] for weight \[48, 40\], got \[3, 41\]"),
        (dict(x=torch.tensor(1.0)), ValueError, r"x must be \[..., 40\]"),
        (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (dict(x=torch.ones(3, 40, dtype=torch.int64)), TypeError,
         "x must be float32, bfloat16, float16 or float64, got torch.int64"),
        (dict(weight=torch.randn(48)), ValueError, r"weight must be \[N, K\].*, got \[48\]"),
        (dict(weight=torch.randn(48, 40).double()), TypeError,
         "weight must have the dtype of x, torch.float32, got torch.float64"),
        (dict(bias=torch.randn(47)), ValueError, r"bias must be \[48\], got \[47\]"),
        (dict(bias=3.0), TypeError, "bias must be a torch.Tensor, got float"),
        (dict(weight=torch.randn(48, 40).to_sparse()), TypeError, "weight must be a strided tensor, got torch.sparse"),
        (dict(down=torch.randn(41, 5)), ValueError, r"down must be \[40, R\].*, got \[41, 5\]"),
        (dict(down=torch.randn(40, 0)), ValueError,
         r"down must be \[40, R\] with every letter at least 1, got \[40, 0\]"),
        (dict(down=torch.randn(40, 5, device="meta")), ValueError, "down must be on the device of x, cpu, got meta"),
        (dict(up=torch.randn(4, 48)), ValueError, r"up must be \[5, 48\], got \[4, 48\]"),
        (dict(up=torch.randn(5, 48).half()), TypeError, "up must have the dtype of x"),
    ],
    ids=str,
)  # fmt: skip
def test_lowrank_linear_refuses(backend, change, error, message):
    good = dict(zip(("x", "weight", "bias", "down", "up"), make()))
    lowrank_linear(**good, backend=backend)  # what is remembered of a call is for such arguments alone
    refuses(error, message, lowrank_linear, **(good | change), backend=backend)


def test_transforms_and_forward_mode_are_refused(backend):
    x, *rest = make()
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (x,)),
        lambda f: torch.func.grad(lambda t: f(t).sum())(x),
        lambda f: torch.func.vmap(f)(x[None]),
    ):
        run = lambda t: lowrank_linear(t, *rest, backend=backend)
        refuses(RuntimeError, "neither torch.func transforms nor forward-mode", transform, run)
    for op in (lowrank_linear, torch.ops.efft_kernels.lowrank_linear):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            refuses(RuntimeError, "forward-mode", op, dual, *rest, backend=backend)


def test_backward_operators_refuse(backend):
    names = torch.ops.efft_kernels
    x, weight, _, down, up = make()
    dy, p = torch.randn(37, 48), torch.randn(37, 5)
    good = [dy, x, weight, down, up, p, [True] * 5]
    for i, value, message in [
        (0, torch.randn(37, 47), r"dy must be \[..., 48\]"),
        (1, None, r"x must be a tensor for needs="),
        (1, torch.randn(36, 40), r"x must be \[37, 40\], got \[36, 40\]"),
        (4, torch.zeros(0, 48), r"up must be \[5, 48\]"),
        (5, None, r"p must be a tensor for needs="),
        (5, torch.randn(37, 4), r"p must be \[37, 5\], got \[37, 4\]"),
        (6, [True], "needs must be five bools"),
    ]:
        refuses(ValueError, message, names.lowrank_linear_backward.default, *good[:i], value, *good[i + 1 :], backend)
    without_x = dy, None, *good[2:6], [False, False, False, True, False], backend
    refuses(ValueError, "x must be a tensor for needs=", names.lowrank_linear_backward.default, *without_x)
    says = r"v must be \[4, N\] with every letter at least 1"
    for n, N, message in ((0, 0, says), (5, 6, r"dup must be \[2, 3, 6\]")):
        given = torch.randn(2, 3, n), torch.randn(2, 3, 4), torch.randn(4, N), 1.0, [True, True], backend
        refuses(ValueError, message, names.group_update_backward.default, *given)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(sigma=torch.randn(2, 3)), ValueError, r"sigma must be \[S, P, Q\].*, got \[2, 3\]"),
        (dict(sigma=torch.randn(0, 3, 4)), ValueError, r"sigma must be \[S, P, Q\] with every letter at least 1"),
        (dict(v=torch.randn(5, 6)), ValueError, r"v must be \[4, N\].*, got \[5, 6\]"),
        (dict(v=torch.randn(4, 6).double()), TypeError, "v must have the dtype of sigma"),
        (dict(scale=math.inf), ValueError, "scale must be finite, got inf"),
        (dict(scale=math.nan), ValueError, "scale must be finite, got nan"),
        (dict(scale=torch.tensor(2.0)), TypeError, "scale must be a number, got Tensor; for a trained scale multiply"),
        (dict(scale="1"), TypeError, "scale must be a number, got str"),
        (dict(scale=10**400), ValueError, "scale must be finite, got 1000"),
        (dict(scale=-1e39), ValueError, r"scale must be in the range of float32, \+-3.403e\+38, for torch.float32"),
        (dict(scale=np.array(2.0)), TypeError, "scale must be a number, got ndarray"),
        (dict(scale=np.float16("inf")), ValueError, "scale must be finite, got inf"),
    ],
    ids=str,
)
def test_group_update_refuses(backend, change, error, message):
    inputs = dict(sigma=torch.randn(2, 3, 4), v=torch.randn(4, 6), scale=1.0) | change
    refuses(error, message, group_update, **inputs, backend=backend)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, np.int64, lambda _: 10**30])
def test_a_number_of_another_kind_is_a_scale(backend, kind):
    scale = kind(2.5)
    sigma, v = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, 6)
    up, want = (group_update(sigma, v, s, backend=backend) for s in (scale, float(scale)))
    assert torch.equal(up, want)
    dup = torch.randn_like(up)
    assert torch.equal(*(torch.autograd.grad(y, sigma, dup)[0] for y in (up, want)))
    for rows in (1, 17):  # in one call, and in two
        given = torch.randn(rows, 5), torch.randn(12, 5), None, torch.randn(5, 3), sigma, v
        torch.testing.assert_close(*(efft_linear(*given, s) for s in (scale, float(scale))))
        refuses(ValueError, "scale must be finite, got -1000", efft_linear, *given, -(10**5000))
        refuses(ValueError, "scale must be in the range of float32", efft_linear, *given, 1e39)
        assert efft_linear(*(t if t is None else t.double() for t in given), 1e39).isfinite().all()


def test_efft_linear_refuses(backend):
    sizes = dict(x=(3, 6), weight=(10, 6), u=(6, 2), sigma=(2, 2, 4), v=(4, 5))
    good = {"bias": None} | {name: torch.randn(size) for name, size in sizes.items()}
    assert efft_linear(**good, backend=backend).shape == (3, 10)
    for change, message in [
        (dict(u=torch.randn(6, 3)), r"u must be \[6, 2\], got \[6, 3\]"),
        (dict(sigma=torch.randn(3, 2, 4)), r"weight must be \[15, K\].*, got \[10, 6\]"),
        (dict(v=torch.randn(3, 5)), r"v must be \[4, N\].*, got \[3, 5\]"),
        (dict(sigma=torch.randn(4)), r"sigma must be \[S, P, Q\].*, got \[4\]"),
    ]:
        refuses(ValueError, message, efft_linear, **good | change, backend=backend)
    for name in sizes:
        # of few rows, in one call
        refuses(TypeError, f"{name} must be a torch.Tensor, got NoneType", efft_linear, **good | {name: None})


def test_refusals_are_the_same_under_compile(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: lowrank_linear(*a, backend=backend), backend="aot_eager", fullgraph=True)
    x, weight, bias, down, up = make()
    refuses(Exception, r"up must be \[5, 48\]", compiled, x, weight, bias, down, up[:4])
