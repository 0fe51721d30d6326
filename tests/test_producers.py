"""Inputs of adapted Linears that are rebuilt in the backward: the same bits, fewer saved bytes, never a stale value."""

import copy
import sys

import benchmark_scripts  # noqa: F401, puts steps on the path
import fuzz
import pytest
import steps
import torch
import torch.nn.functional as F
from models import METHODS, adapted, assert_bits, gradients, images, loss_of, shake, swin, vit, vit_of_transformers
from refusals import refuses
from torch import nn
from torch.utils.checkpoint import checkpoint

import efft_kernels as ek
from efft_kernels import lowrank_linear, mixed_linear
from efft_kernels.kernels import cpu, reference
from efft_kernels.ops import producers

C = 32


@pytest.fixture(autouse=True)
def switched_on():
    yield
    ek.rebuild_inputs(None)


def kept_bytes(run, model=None) -> int:
    """Bytes that are saved for the backward, each storage once, without the parameters and buffers of the model."""
    with (saved := steps.Saved(model or nn.Module())):
        _result = run()
    return saved.bytes


class RMSNorm(nn.Module):
    """As timm and transformers write it for devices without a fused kernel."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(C)), 1e-6

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def windows(t):
    return torch.roll(t, (-2, -2), (1, 2)).view(2, 2, 4, 2, 4, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, C)


NORM = nn.LayerNorm(C, eps=1e-5)
nn.init.normal_(NORM.weight)
nn.init.normal_(NORM.bias)
ROOT = RMSNorm()
KNOWN = nn.ModuleList([NORM, ROOT])
# name -> how x [..., C] is made of h [2, 8, 8, C]
PRODUCERS = {
    "layer_norm": NORM,
    "rms_norm": ROOT,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "swiglu": lambda h: F.silu(h) * (h + 1),
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "gelu_dropout": lambda h: F.dropout(F.gelu(h), 0.3),
    "reshaped": lambda h: F.gelu(h).reshape(-1, C),
    "windows": lambda h: windows(NORM(h)),
    "padded_by_nothing": lambda h: F.pad(NORM(h), (0, 0, 0, 0)),
    "rounded": lambda h: F.gelu(h).to(torch.bfloat16).to(h.dtype),
    "rounded_and_scaled": lambda h: F.gelu(h).to(torch.bfloat16) * h.detach(),
    "enlarged": lambda h: F.gelu(h).view(2, -1, C).view(2, 1, -1, C) * torch.randn(2, 4, 1, C).to(h.dtype),
    "attention": lambda h: (h.flatten(1, 2) @ h.flatten(1, 2).mT @ h.flatten(1, 2)).reshape(2, -1, C),
}


def low_rank(dtype=torch.float32, N=24, R=4):
    weight, down, up = torch.randn(N, C), torch.randn(C, R), torch.randn(R, N)
    return weight.to(dtype), down.to(dtype).requires_grad_(), up.to(dtype).requires_grad_()


def hidden(dtype=torch.float32):
    leaf = torch.randn(2, 8, 8, C).to(dtype).requires_grad_()
    return leaf, leaf * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRODUCERS)
def test_x_of_each_producer_has_the_same_bits(name, dtype):
    KNOWN.to(dtype)
    producers.know(KNOWN)
    x = PRODUCERS[name](hidden(dtype)[1])
    recipe, tensors = producers.kept_for(x)
    assert recipe is not None and all(t is not x for t in tensors)
    with torch.no_grad():
        assert torch.equal(recipe.x(list(tensors))[0], x)
    KNOWN.float()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_gradients_have_the_same_bits_and_less_is_saved(amp, mixed):
    producers.know(KNOWN)
    weight, down, up = low_rank()
    ids = torch.tensor([1, 0])
    saved, found = {}, {}
    for enabled in (False, True):
        ek.rebuild_inputs(enabled)
        torch.manual_seed(0)
        leaf, h = hidden()

        def run(h=h):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                x = F.gelu(NORM(h))
                if mixed:
                    return mixed_linear(x, weight, None, torch.stack([down] * 2), torch.stack([up] * 2), ids)
                return lowrank_linear(x, weight, None, down, up)

        run()  # compares the norm's bits once
        saved[enabled] = kept_bytes(run)
        found[enabled] = torch.autograd.grad(run().float().square().sum(), (leaf, down, up))
    assert all(map(torch.equal, found[False], found[True]))
    assert saved[False] - saved[True] >= h.numel() * (2 if amp else 4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_gradient_of_a_rebuilt_x_takes_its_memory(backend, readers, mixed, monkeypatch):
    if backend == "cpu" and cpu.unavailable():
        pytest.skip(cpu.unavailable())
    name = "mixed_linear" if mixed else "lowrank_linear"
    op, module = getattr(ek, name), sys.modules[f"efft_kernels.ops.{name}"]
    made, build, places, backward = [], producers.Recipe.build, [], module._backward

    def spy(*args, **options):
        grads = backward(*args, **options)
        places.append(grads[0].data_ptr())
        return grads

    monkeypatch.setattr(producers.Recipe, "build", lambda *args: made.append(build(*args)) or made[-1])
    monkeypatch.setattr(module, "_backward", spy)
    monkeypatch.setattr(reference, "_onednn_leads", lambda: False)
    x, loss = F.gelu(hidden()[1]), 0
    for weight, down, up in (low_rank() for _ in range(readers)):
        more = (torch.stack([down] * 2), torch.stack([up] * 2), torch.tensor([1, 0])) if mixed else (down, up)
        loss = loss + op(x, weight, None, *more, backend=backend).sum()
    loss.backward()
    assert len(made) == 1 and len(places) == readers
    assert [place == made[0].data_ptr() for place in places] == [False] * (readers - 1) + [True]  # the last alone


@pytest.mark.skipif("cpu" not in fuzz.backends(), reason="not built")
def test_a_rebuilt_x_is_whole_where_the_gradient_of_the_weight_reads_it():
    leaf, h = hidden()
    x, (weight, down, up) = F.gelu(h), low_rank()
    y = lowrank_linear(x, weight.requires_grad_(), None, down, up, backend="cpu")
    dweight, _ = torch.autograd.grad(y.sum(), (weight, leaf))
    torch.testing.assert_close(dweight, torch.ones(24, 128) @ x.detach().flatten(0, -2), rtol=1e-4, atol=1e-4)


def test_one_x_of_several_linears_is_rebuilt_once(monkeypatch):
    producers.know(KNOWN)
    calls, original = [], producers.Recipe.build
    monkeypatch.setattr(producers.Recipe, "build", lambda *a: calls.append(1) or original(*a))
    linears = [low_rank() for _ in range(3)]

    def step(amp):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            x = NORM(hidden()[1])
            return sum(lowrank_linear(x, weight, None, down, up).float().sum() for weight, down, up in linears)

    for amp in (False, True):
        step(amp).backward()  # compares
        calls.clear()
        loss = step(amp)
        assert not calls
        loss.backward(retain_graph=True)
        assert len(calls) == 1
        loss.backward()  # and once more in a second backward
        assert len(calls) == 2


def test_a_change_in_place_is_an_error_or_right():
    weight, down, up = low_rank()
    gelu, kept = F.gelu, producers.kept_for

    def gradient(before=lambda h, x: None, after=lambda h, x: None):
        torch.manual_seed(0)
        leaf, h = hidden()
        x = gelu(h)
        with torch.no_grad():
            before(h, x)
        value = x.detach().clone()
        assert kept(x)[0] is None or torch.equal(kept(x)[0].build(list(kept(x)[1])), value)
        y = lowrank_linear(x, weight, None, down, up)
        with torch.no_grad():
            after(h, x)
        dp = (torch.ones_like(y) @ up.t()).flatten(0, -2)
        return torch.autograd.grad(y.sum(), down)[0], value.flatten(0, -2).t() @ dp

    for change in ({}, {"before": lambda h, x: h.add_(1)}, {"before": lambda h, x: x.mul_(2)}):
        torch.testing.assert_close(*gradient(**change))
    refuses(RuntimeError, "modified by an inplace operation", gradient, after=lambda h, x: h.add_(1))
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: t, lambda t: t), pytest.raises(RuntimeError, match="modified in place"):
        gradient(after=lambda h, x: h.add_(1))
    with hooks(lambda t: t, lambda t: t):
        torch.testing.assert_close(*gradient(before=lambda h, x: h.add_(1)))


def test_a_change_in_place_is_seen_behind_the_cast_of_autocast():
    weight, down, up = low_rank()
    x = F.gelu(hidden()[1])
    with torch.no_grad():
        x.mul_(2)
    with torch.autocast("cpu", torch.bfloat16):
        y = lowrank_linear(x, weight, None, down, up)
    want = x.detach().flatten(0, -2).T @ (torch.ones(128, 24) @ up.T)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), down)[0], want, rtol=0.05, atol=1.0)


def test_an_x_is_rebuilt_in_its_own_precision_by_a_backward_under_autocast():
    weight, down, up = low_rank()
    x = PRODUCERS["attention"](hidden()[1] / 8)
    y = lowrank_linear(x, weight, None, down, up)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(y.sum(), down)
    want = x.detach().flatten(0, -2).T @ (torch.ones(128, 24) @ up.T)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-3)


def test_hooks_that_pack_something_else_get_x():
    for pack, unpack in ((lambda t: (t,), lambda p: p[0]), (lambda t: t.clone(), lambda t: t)):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            x = F.gelu(hidden()[1])
            assert producers.kept_for(x)[0] is None
        assert producers.kept_for(x)[0] is None  # nor is anything unpacked afterwards
    x = F.gelu(hidden()[1])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert producers.kept_for(x)[0] is None


def test_a_changed_eps_and_an_unknown_norm():
    norm = nn.LayerNorm(C, eps=1e-5)
    make = lambda: norm(hidden()[1])
    assert producers.kept_for(make())[0] is None
    producers.know(norm)
    for eps in (1e-5, 1e-1):
        norm.eps = eps
        x = make()
        recipe, tensors = producers.kept_for(x)
        assert torch.equal(recipe.build(list(tensors)), x)
    norm.forward = lambda h: F.layer_norm(h, (C,), norm.weight, norm.bias, 1e-2)  # not the module's own eps
    norm.eps = 1e-3
    assert producers.kept_for(make())[0] is None
    freed = norm(hidden()[1])
    norm.weight.untyped_storage().resize_(0)  # as FSDP leaves it after the norm's forward
    assert producers.kept_for(freed)[0] is None


def test_inputs_are_rebuilt_on_a_cpu_unless_it_is_said_and_elsewhere_if_it_is():
    cpu, gpu = torch.zeros(1), torch.zeros(1, device="meta")
    for setting, expected in ((None, (True, False)), (True, (True, True)), (False, (False, False))):
        ek.rebuild_inputs(setting)
        assert (producers.rebuilds(cpu), producers.rebuilds(gpu)) == expected
    refuses(TypeError, "enabled must be True, False or None, got 'off'", ek.rebuild_inputs, "off")


def model_gradients(model, run=None):
    found = {}
    for enabled in (False, True):
        ek.rebuild_inputs(enabled)
        torch.manual_seed(1)
        model.zero_grad()
        (run or (lambda m: loss_of(m, images())))(model).backward()
        found[enabled] = gradients(model)
    assert_bits(found[False], found[True])
    return found[True]


def step_of(model, dtype, amp):
    torch.manual_seed(1)
    x = images(16, dtype).requires_grad_()  # so that the frozen model has a backward, too

    def forward(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = model(x)
            return F.cross_entropy(getattr(y, "logits", y).float(), torch.arange(16) % 10)

    return forward


SIZES = dict(hidden_size=96, num_hidden_layers=1, intermediate_size=384, patch_size=4)
MAKE = dict(vit=lambda: vit(patch_size=4, depth=1), swin=swin, transformers=lambda: vit_of_transformers(**SIZES))


@pytest.mark.parametrize("dtype, amp", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_step_holds_what_the_frozen_model_holds(make, dtype, amp):
    model = make().to(dtype).requires_grad_(False).train()
    list(model.children())[-1].requires_grad_(True)
    step = step_of(model, dtype, amp)
    frozen = kept_bytes(lambda: step(model), model)
    for method in ("efft1", "lora-all", "fact-tt", "efft2"):
        adapted = shake(ek.inject(copy.deepcopy(model), METHODS[method])).to(dtype).train()
        step(adapted)  # compares the norms' bits once
        assert kept_bytes(lambda m=adapted: step(m), adapted) <= 1.06 * frozen
    model_gradients(adapted, step)
    ek.rebuild_inputs(False)
    assert kept_bytes(lambda: step(adapted), adapted) > 1.2 * frozen


def test_a_copied_model_is_rebuilt_too():
    model = adapted().train()
    copied = copy.deepcopy(model)
    assert_bits(model_gradients(copied), model_gradients(model))


@pytest.mark.parametrize("rows", [4, 400])
def test_casts_of_frozen_weights_do_not_outlive_the_call(rows):
    producers.know(KNOWN)
    linear, (_, down, up) = nn.Linear(C, 24).requires_grad_(False), low_rank()
    found = {}
    for enabled in (False, True):
        ek.rebuild_inputs(enabled)
        h = torch.ones(rows, C, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = lowrank_linear(h, linear.weight, linear.bias, down, up)
        saved = [t for t in y.grad_fn.saved_tensors if t is not None and t.shape == linear.weight.shape]
        assert [t is linear.weight for t in saved] == [enabled]
        found[enabled] = torch.autograd.grad(y.float().square().sum(), (h, down, up))
        with torch.autocast("cpu", torch.bfloat16):
            y = lowrank_linear(h, linear.weight, linear.bias, down, up)
        with torch.no_grad():
            linear.weight.mul_(2)
        if enabled:
            refuses(RuntimeError, "modified by an inplace operation", y.sum().backward)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                y = lowrank_linear(h, linear.weight, linear.bias, down, up)  # the panels are made anew
            wanted = F.linear(h, linear.weight, linear.bias) + h @ down @ up
            torch.testing.assert_close(y.float(), wanted, rtol=0.1, atol=0.5)
        with torch.no_grad():
            linear.weight.div_(2)
    assert all(map(torch.equal, found[False], found[True]))


@pytest.mark.skipif("cpu" not in fuzz.backends(), reason="not built")
@pytest.mark.parametrize("patch", [4, 16])  # many rows and few
def test_panels_under_autocast_belong_to_the_parameters(patch):
    cpu.clear_packed()
    model = ek.inject(vit(patch_size=patch).requires_grad_(False), METHODS["efft2"], backend="cpu").train()
    step, held = step_of(model, torch.float32, True), []
    for _ in range(2):
        loss = step(model)
        held.append(cpu.packed_bytes())
        loss.backward()
        held.append(cpu.packed_bytes())
    numbers = sum(m.weight.numel() for m in model.modules() if hasattr(m, "efft") and hasattr(m, "weight"))
    assert held == [2 * numbers] * 4
    del model, step, loss
    assert not cpu.packed_bytes()


def test_checkpointing_and_two_forwards():
    model = adapted().train()
    model_gradients(model, lambda m: loss_of(m, images()) + loss_of(m, images()))
    model.set_grad_checkpointing()
    model_gradients(model)
    gelu = lambda h: checkpoint(F.gelu, h, use_reentrant=False)
    model.set_grad_checkpointing(False)
    for block in model.blocks:
        block.mlp.act.forward = gelu
    model_gradients(model)


def test_norms_are_trained():
    model = adapted().train()
    for block in model.blocks:
        block.norm2.requires_grad_(True)
    model_gradients(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    model_gradients(model)
