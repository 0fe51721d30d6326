"""The variants of bench_forward.py: ways to compute y = x (w + dW).T + b, w frozen and dW.T = scale * u @ sigma @ v.

A variant is built once per set of inputs, which packs weights and compiles formulas outside the timing. The call that
it returns is timed.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import efft_kernels

SCALE = 10.0
UPDATE = 1e-2  # |dW| / |w| of the random data, as in the middle of a fine-tuning


class Inputs(NamedTuple):
    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    bias: Tensor  # [N]
    u: Tensor  # [K, R]
    sigma: Tensor  # [S, R, R]
    v: Tensor  # [R, N / S]
    down: Tensor  # [K, R], u
    up: Tensor  # [R, N], scale * sigma @ v, the slices side by side
    dy: Tensor  # [M, N]
    merged: Tensor  # [N, K], weight + dW, rounded once


def make_inputs(M, layer, R, dtype, device, *, grad=False, seed=0) -> Inputs:
    """Random inputs. fc2 gets its factors as a model would: the transposed slice of a group, by strides alone."""
    K, N, S = layer.K, layer.N, layer.slices
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape, std=1.0):
        return torch.randn(*shape, generator=g, device=device).mul_(std).to(dtype)

    std = UPDATE / (SCALE * math.sqrt(R))
    if layer.kind == "fc2":
        u = normal(R, K, std=K**-0.5).t()
        sigma, v = normal(1, R, R, std=R**-0.5).transpose(1, 2), normal(N, R, std=std).t()
    else:
        u, sigma, v = normal(K, R, std=K**-0.5), normal(S, R, R, std=R**-0.5), normal(R, N // S, std=std)
    up = _up(sigma.double(), v.double()).to(dtype)
    weight = normal(N, K, std=K**-0.5)
    merged = (weight.double() + update(u, sigma, v).t()).to(dtype)
    trained = [t.requires_grad_(grad) for t in (u, sigma, v, u.detach().clone(), up)]
    return Inputs(normal(M, K).requires_grad_(grad), weight, normal(N), *trained, normal(M, N), merged)


def _up(sigma: Tensor, v: Tensor) -> Tensor:  # [R, N]
    return (SCALE * sigma @ v).transpose(0, 1).flatten(1)


def update(u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:  # [K, N]
    """dW.T = scale * u @ sigma @ v in float64"""
    return u.double() @ _up(sigma.double(), v.double())


@torch.no_grad()
def truth(i: Inputs, rows: slice) -> tuple[Tensor, Tensor]:
    """(y, what the adapter adds to it) of some rows of x, in float64"""
    x = i.x[rows].double()
    added = x @ update(i.u, i.sigma, i.v)
    return x @ i.weight.double().t() + i.bias.double() + added, added


def einsum_dw(x, w, b, u, sigma, v):
    """y = F.linear(x, w, b) + x dW, with dW formed in every call, as in the released EFFT code"""
    dw = torch.einsum("kp,spq,qn->ksn", u, sigma, v).flatten(1)
    return F.linear(x, w, b) + SCALE * (x @ dw)


def einsum_merge(x, w, b, u, sigma, v):
    """y = x (w + dW).T + b, with dW formed and added in every call: one GEMM over M, but an additional pass over w"""
    dw = torch.einsum("kp,spq,qn->snk", u, sigma, v).flatten(0, 1)
    return F.linear(x, w + SCALE * dw, b)


def einsum(x, w, b, u, sigma, v):
    """y = F.linear(x, w, b) + x u sigma v from the left, without dW"""
    added = torch.einsum("mp,spq,qn->msn", x @ u, sigma, v)
    return F.linear(x, w, b) + SCALE * added.flatten(1)


def left_to_right(x, w, b, u, sigma, v):
    """y = F.linear(x, w, b), then y += ((x u) sigma) v in place: the fastest order in plain torch for a few rows"""
    q, y = (x @ u) @ sigma.transpose(0, 1).flatten(1), F.linear(x, w, b)
    y.view(-1, v.shape[1]).addmm_(q.view(-1, v.shape[0]), v, alpha=SCALE)
    return y


def peft(x, w, b, a, lora_b):
    """y = F.linear(x, w, b) + (x A) B * scale: LoRA as the PEFT library computes it"""
    return F.linear(x, w, b) + (x @ a) @ lora_b * SCALE


def addmm(x, w, b, down, up):
    """y = F.linear(x, w, b), then y += (x down) up in place: the fastest order in plain torch without fusion"""
    return F.linear(x, w, b).addmm_(x @ down, up)


def onednn(x, w, b):
    """y = x w.T + b by oneDNN, whatever library torch would choose"""
    return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")


class Call(NamedTuple):
    forward: Callable[[], Tensor]
    trained: tuple[Tensor, ...]  # the tensors that get gradients in addition to x


class Variant(NamedTuple):
    name: str
    meaning: str
    build: Callable[[Inputs], Call]
    merged: bool = False  # computes with w + dW rounded to its dtype
    compiled: bool = False


class ExternalLinear(torch.autograd.Function):
    """y = product(x), dx = back(dy): a Linear of a library without autograd formulas"""

    @staticmethod
    def forward(ctx, x, product, back):
        ctx.back = back
        return product(x)

    @staticmethod
    def backward(ctx, dy):
        return ctx.back(dy), None, None


def _onednn(prepare):
    def build(i: Inputs) -> Call:
        w = prepare(i.merged, i.x.shape[0])
        if not i.x.requires_grad:
            return Call(lambda: onednn(i.x, w, i.bias), ())
        wt = prepare(i.merged.t().contiguous(), i.x.shape[0])
        product, back = (lambda x: onednn(x, w, i.bias)), (lambda dy: onednn(dy, wt, None))
        return Call(lambda: ExternalLinear.apply(i.x, product, back), ())

    return build


def _of_core(formula):
    return lambda i: Call(lambda: formula(i.x, i.weight, i.bias, i.u, i.sigma, i.v), (i.u, i.sigma, i.v))


def _of_lora(formula):
    def build(i: Inputs) -> Call:
        lora_b = (i.up.detach() / SCALE).requires_grad_(i.up.requires_grad)
        return Call(lambda: formula(i.x, i.weight, i.bias, i.down, lora_b), (i.down, lora_b))

    return build


def _of_pair(formula):
    return lambda i: Call(lambda: formula(i.x, i.weight, i.bias, i.down, i.up), (i.down, i.up))


def _compiled(of, formula, mode: str | None = None):
    # compile on first use, so that a run without this variant never loads the compiler; all copies share the graph
    compiled = []

    def build(i: Inputs) -> Call:
        if not compiled:
            compiled.append(torch.compile(formula, dynamic=False, fullgraph=True, mode=mode))
        return of(compiled[0])(i)

    return build


def variants(device: str) -> tuple[list[Variant], dict[str, str]]:
    """All variants for a device, and {name: why} for the backends that cannot run on it."""
    merged = lambda i: Call(lambda: F.linear(i.x, i.merged, i.bias), ())
    found = [
        Variant("merged", "F.linear with w + dW merged beforehand: the lower bound", merged, merged=True),
        Variant("einsum_dw", "F.linear + x dW, dW formed per call, as the released EFFT", _of_core(einsum_dw)),
        Variant("einsum_merge", "F.linear with w + dW, formed per call", _of_core(einsum_merge), merged=True),
        Variant("einsum", "F.linear + ((x u) sigma) v by einsum", _of_core(einsum)),
        Variant("left_to_right", "F.linear, then addmm_ of ((x u) sigma) v: for few rows", _of_core(left_to_right)),
        Variant("einsum_compiled", "einsum under torch.compile", _compiled(_of_core, einsum), compiled=True),
        Variant("peft", "F.linear + (x A) B * scale, as PEFT's LoRA", _of_lora(peft)),
        Variant("peft_compiled", "peft under torch.compile", _compiled(_of_lora, peft), compiled=True),
        Variant("unfused", "F.linear, then addmm_ (beta = 1): plain torch at its best", _of_pair(addmm)),
    ]
    if device == "cpu":
        plain, packed = _onednn(lambda w, M: w), _onednn(torch.ops.mkldnn._reorder_linear_weight)
        found[1:1] = [
            Variant("onednn", "as merged, by oneDNN instead of torch's default library", plain, merged=True),
            Variant("onednn_packed", "as onednn, the weight packed beforehand", packed, merged=True),
        ]
    else:
        # without CUDA graphs, which would remove launch time from this variant alone
        autotuned = _compiled(_of_lora, peft, "max-autotune-no-cudagraphs")
        found.append(Variant("peft_autotuned", "peft under torch.compile, mode max-autotune", autotuned, compiled=True))
    skipped = {}
    for backend in efft_kernels.backends():
        name = f"efft_{backend.name}"
        if not backend.available:
            skipped[name] = backend.note
        elif backend.name == "triton" and (device == "cpu" or os.environ.get("TRITON_INTERPRET") == "1"):
            skipped[name] = "here it runs only through Triton's interpreter, whose time means nothing"
        elif backend.name in ("cpu", "cuda") and backend.name != device:
            skipped[name] = f"does not run on device {device}"
        else:
            named = functools.partial(efft_kernels.lowrank_linear, backend=backend.name)
            found.append(Variant(name, f"lowrank_linear, backend={backend.name!r}", _of_pair(named)))
    chosen = _of_pair(efft_kernels.lowrank_linear)
    group = _of_core(lambda *given: efft_kernels.efft_linear(*given, SCALE))
    found.append(Variant("efft", "lowrank_linear, backend=None: what a user gets", chosen))
    found.append(Variant("efft_group", "efft_linear: as efft, plus a group update in every call", group))
    return found, skipped
