"""Operands in every layout of memory: the right result in every backend, or an error that names the argument."""

import functools

import fuzz
import pytest
import torch
import torch.nn.functional as F
from refusals import refuses

import efft_kernels as ek
from efft_kernels.kernels import memory, reference
from efft_kernels.ops.overlap import repeats, share_memory

built = pytest.mark.skipif("cpu" not in fuzz.backends(), reason="not built")
CPU = pytest.param("cpu", marks=built)


@pytest.mark.parametrize("op", fuzz.OPS)
def test_random_calls(op):
    fast = [name for name in fuzz.backends() if name != "triton"]
    done = fuzz.run(100, 0, fast, (op,))
    assert done["computed"] >= 25 and done["freed"] >= 1


@pytest.mark.skipif("triton" not in fuzz.backends(), reason="needs triton")
@pytest.mark.parametrize("op", fuzz.OPS)
def test_random_calls_of_triton(op):
    assert fuzz.run(60, 0, ["triton"], (op,))["computed"] >= 30


def arguments(op: str) -> dict:
    r = torch.randn
    made = dict(x=r(6, 4), weight=r(8, 4), bias=r(8))
    rest = dict(scale=1.0, dy=r(6, 8))
    if op == "efft_linear":  # is made of two operators of torch
        return made | dict(u=r(4, 2), sigma=r(2, 2, 3), v=r(3, 4)) | rest
    made |= rest | dict(p=r(6, 2), needs=[True] * (2 if "group" in op else 5), sigma=r(3, 2, 4), v=r(4, 8))
    made |= dict(dup=r(3, 2, 8), down=r(4, 2), up=r(2, 8), weights=[r(8, 4)], downs=[r(4, 2)], ups=[r(2, 8)])
    if "mixed" in op:
        made |= dict(down=r(3, 4, 2), up=r(3, 2, 8), ids=torch.tensor([0, 2, 1]))
    names = [a.name for a in getattr(torch.ops.efft_kernels, op).default._schema.arguments]
    return {name: made[name] for name in names if name in made}


@pytest.mark.parametrize("backend", fuzz.backends())
@pytest.mark.parametrize("op", fuzz.OPS)
def test_each_argument_without_its_memory_is_named(op, backend):
    for name in arguments(op):
        if name not in ("scale", "needs"):
            for share, first in ((0.0, False), (1.0, True)):
                fuzz.check_freed(backend, op, arguments(op), name, share, first)


@pytest.mark.parametrize("backend", ["reference", CPU])
def test_a_weight_that_is_freed_after_the_forward(backend):
    x, weight, down, up = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8), torch.randn(8, 2), torch.randn(2, 8)
    y = ek.lowrank_linear(x, weight, None, down, up, backend=backend)
    held = weight.untyped_storage()
    bytes_held = held.nbytes()
    held.resize_(0)
    refuses(RuntimeError, "weight must have memory", y.sum().backward, retain_graph=True)
    held.resize_(bytes_held)
    with torch.autograd._unsafe_preserve_version_counter(weight):  # as FSDP gathers it again
        weight.fill_(1)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (torch.ones(4, 8) @ (torch.ones(8, 8) + (down @ up).T)))


@pytest.mark.parametrize("backend", [None, "reference", CPU])
def test_sizes_whose_product_overflows(backend):
    z, n = torch.zeros(1, 1), 2**31
    wide, square, linear = z.expand(1, n), z.expand(n, n), functools.partial(ek.lowrank_linear, backend=backend)
    refuses(ValueError, "weight must be of sizes that fit into memory", linear, wide, square, None, wide.T, wide)
    refuses(ValueError, "down must be of sizes that fit into memory", linear, wide[:0], wide, None, square, wide.T)
    refuses(ValueError, "x and weight must be of sizes", linear, wide.T, wide.T, None, z, wide)
    refuses(ValueError, "sigma and v must be of sizes", ek.group_update, z.expand(n, 1, 1), wide, backend=backend)
    refuses(ValueError, r"weights\[0\] must be of sizes", ek.merge_, [square], [wide.T], [wide], backend=backend)


@built
def test_the_compiled_operators_check_sizes_themselves():
    z, n = torch.zeros(1, 1), 2**31
    refuses(RuntimeError, "weight must fit into memory", torch.ops.efft_cpu.pack, z.expand(n, n), False)
    packed = torch.ops.efft_cpu.pack(z, False)
    with pytest.raises(RuntimeError, match="down must fit into memory"):
        torch.ops.efft_cpu.lowrank_linear(z[:0], packed, None, z.expand(1, 2**61), z.expand(2**61, 1))
    packed.untyped_storage().resize_(1)
    refuses(RuntimeError, "packed must have memory", torch.ops.efft_cpu.lowrank_linear, z, packed, None, z, z)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_onednn_reads_any_bias_and_is_not_given_rows_that_overlap(monkeypatch):
    monkeypatch.setattr(reference, "_onednn_leads", lambda: True)
    monkeypatch.setattr(reference, "_large_product_last", lambda *of: False)  # as on every processor where oneDNN leads
    x, down, up = (torch.randn(size, requires_grad=True) for size in ((16, 32), (32, 4), (4, 24)))
    weight, window, dy = torch.randn(24, 32), torch.randn(600).as_strided((24, 32), (1, 1)), torch.randn(16, 24)
    biases = torch.randn(24, 2)[:, 0], torch.ones(1).expand(24), torch.randn(30)[5:29], torch._neg_view(torch.randn(24))
    calls = [(window, None), (torch.randn(24, 64)[:, ::2], None), *((weight, bias) for bias in biases)]
    results = lambda y: (y, *torch.autograd.grad(y, (x, down, up), dy))
    wanted = [results(F.linear(x, *call) + x @ down @ up) for call in calls]
    for call, want in zip(calls, wanted):
        torch.testing.assert_close(results(ek.lowrank_linear(x, *call, down, up, backend="reference")), want)
        monkeypatch.setattr(F, "linear", None)  # not to be called where rows do not overlap


def test_merge_refuses_weights_that_share_memory():
    down, up, buffer = torch.randn(4, 2), torch.randn(2, 4), torch.randn(40)
    square = lambda start: buffer[start : start + 16].view(4, 4)
    halves, before = torch.randn(4, 8), buffer.clone()
    for weights, downs in (
        ([buffer.as_strided((4, 4), (1, 1))], [down]),
        ([buffer.as_strided((4, 4), (3, 1))], [down]),
        ([square(0), square(15)], [down, down]),
        ([square(0)], [buffer[15:23].view(4, 2)]),
        ([torch._neg_view(square(0))], [down]),
    ):
        refuses(ValueError, "weights", ek.merge_, weights, downs, [up] * len(weights))
        assert torch.equal(buffer, before)
    wanted = halves + torch.cat([(down @ up).T] * 2, 1)
    ek.merge_([halves[:, :4], halves[:, 4:]], [down, down], [up, up])  # rows of one lie between rows of the other
    torch.testing.assert_close(halves, wanted)


def test_shared_entries_are_found_exactly():
    buffer = torch.zeros(200)

    def entries(t):
        rows, columns = (step * torch.arange(n) for n, step in zip(t.shape, t.stride()))
        return (t.storage_offset() + rows[:, None] + columns).flatten().tolist()

    generator = torch.Generator().manual_seed(0)
    pick = lambda high: int(torch.randint(high, (), generator=generator))
    for _ in range(400):
        a, b = (buffer.as_strided((pick(5), pick(5)), (pick(9), pick(9)), pick(40)) for _ in range(2))
        assert repeats(a) == (len(set(entries(a))) < a.numel())
        if a.numel() and b.numel() and not repeats(a):
            assert share_memory(a, b) == bool(set(entries(a)) & set(entries(b)))


def test_tensors_without_a_storage_are_left_to_torch():
    assert memory.within(torch.ones(3, 3).to_mkldnn()) if torch.backends.mkldnn.is_available() else True
