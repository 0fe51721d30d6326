"""The CUDA kernels: on a GPU where there is one, and always on the host, in a simulator of their instructions."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import assert_accurate, check_lowrank_linear
from operands import LAYOUTS, make
from refusals import refuses

from efft_kernels.kernels import cuda, reference
from efft_kernels.kernels.tuning import table

sys.path.insert(0, str(Path(__file__).parent / "cuda"))
import faults
import simulator
from simulator import Simulated

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
shapes = lambda *given: pytest.mark.parametrize("shape", given, ids=lambda s: "M{}-K{}-N{}-R{}".format(*s))
ORDERS = Simulated.MODES + Simulated.BY_CHANCE
ways = pytest.mark.parametrize("single", [True, False], ids=["single_pass", "extended_k"])


@pytest.fixture(scope="session")
def built() -> Simulated:
    if simulator.compiler() is None:
        pytest.skip("the simulator needs a C++ compiler: c++, or the environment variable CXX")
    return simulator.loaded()


@pytest.fixture
def simulated(built, monkeypatch) -> Simulated:
    """The backend module with the simulator's operators."""
    monkeypatch.setattr(cuda, "load", lambda: built.ops)
    built.mode(False, False)
    return built


@pytest.fixture(params=["simulator"] if cuda.unavailable() else ["simulator", "gpu"])
def device(request) -> str:
    """The device of a test's tensors, on which the backend module runs."""
    if request.param == "gpu":
        return "cuda"
    request.getfixturevalue("simulated")
    return "cpu"


@pytest.fixture
def hopper_device(device) -> str:
    """The same, if the kernel for compute capability 9.0 runs on it."""
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it is for compute capability 9.0")
    return device


def plan(monkeypatch, single: bool, large: bool) -> None:
    made = cuda.KernelPlan(single, False, cuda.LARGE_TILE if large else cuda.SMALL_TILE)
    monkeypatch.setattr(cuda, "_plan", lambda *sizes, **more: made)


HOPPER = [(tile, True) for tile in cuda.HOPPER_TILES_BESIDE] + [(tile, False) for tile in cuda.HOPPER_TILES]
hopper_plans = pytest.mark.parametrize("tile, single", HOPPER, ids=lambda v: str(v))


def hopper(monkeypatch, single: bool, tile: int) -> None:
    """The kernel for compute capability 9.0; its backward never computes dp in the launch of dx."""

    def made(op, x, weight, R, needs=None):
        beside = single and (weight.t() if needs is None else weight).stride(0) == 1
        return cuda.KernelPlan(beside, True, tile if beside or tile in cuda.HOPPER_TILES else 128)

    monkeypatch.setattr(cuda, "_plan", made)


@ways
@pytest.mark.parametrize("mode", Simulated.MODES, ids=lambda mode: "-".join(map(str, map(int, mode))))
@shapes((130, 328, 72, 16), (70, 200, 136, 40))
def test_any_order_of_warps_and_copies(shape, mode, single, simulated, monkeypatch):
    """More steps than stages of the pipeline, and tiles in both directions."""
    plan(monkeypatch, single, False)
    simulated.mode(*mode)
    check_lowrank_linear(cuda, *make(*shape, torch.bfloat16))


@dtypes
@hopper_plans
@shapes((197, 136, 24, 3), (300, 264, 200, 16), (130, 64, 520, 17))
def test_hopper(shape, tile, single, dtype, hopper_device, monkeypatch):
    hopper(monkeypatch, single, tile)
    check_lowrank_linear(cuda, *make(*shape, dtype, hopper_device))


@hopper_plans
def test_hopper_in_any_order(tile, single, hopper_device, monkeypatch, request):
    """The same bits, with more steps than stages, more tiles than blocks, a block of a cluster past the last column."""
    hopper(monkeypatch, single, tile)
    x, weight, bias, down, up, dy = make(300, 456, 2 * tile + 24, 16, torch.bfloat16, hopper_device)
    check_lowrank_linear(cuda, x, weight, bias, down, up, dy, (True, False, False, True, True))
    runs = []
    for mode in ORDERS:
        if hopper_device == "cpu":
            request.getfixturevalue("simulated").mode(*mode)
        y, p = cuda.lowrank_linear(x, weight, bias, down, up)
        runs.append([y, p, *cuda.lowrank_linear_backward(dy, x, weight, down, up, p, [True, False, False, True, True])])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("R", [1, 8, 31, 32, 33, 64, 65, 100, 256])
def test_hopper_at_any_rank(R, hopper_device, monkeypatch):
    for tile, single in HOPPER:
        if single and R > cuda.HOPPER_RANK_BESIDE:
            continue
        hopper(monkeypatch, single, tile)
        x, weight, _, down, up, dy = make(140, 320, 264, R, torch.bfloat16, hopper_device)
        check_lowrank_linear(cuda, x, weight, None, down, up, dy, (True, False, False, True, True))


# Layouts of down [K, R] and up [R, N] in memory: one that is not aligned to 16 bytes, or unlike the other, is copied.
LOW = {
    "as it is": (lambda down: down, lambda up: up),
    "both transposed": (lambda down: down.t().contiguous().t(), lambda up: up.t().contiguous().t()),
    "one transposed": (lambda down: down.t().contiguous().t(), lambda up: up),
    "the other": (lambda down: down, lambda up: up.t().contiguous().t()),
    "columns of a wider one": (lambda down: wider(down, 8, 3), lambda up: wider(up, 1, 9)),
}


def wider(t, left, right):
    return torch.nn.functional.pad(t, (left, right), value=float("nan"))[:, left : left + t.shape[1]]


@ways
@pytest.mark.parametrize("R", [4, 16, 24])
@pytest.mark.parametrize("low", LOW)
def test_hopper_with_factors_of_any_strides(low, R, single, hopper_device, monkeypatch):
    hopper(monkeypatch, single, 192)
    x, weight, bias, down, up, dy = make(130, 72, 200, R, torch.float16, hopper_device)
    x, dy = wider(x, 8, 16), wider(dy, 16, 8)
    weight, bias = wider(weight, 0, 8), bias.repeat_interleave(2)[::2]
    check_lowrank_linear(cuda, x, weight, bias, LOW[low][0](down), LOW[low][1](up), dy)
    if not single:  # weight as it is in memory, or transposed
        check_lowrank_linear(cuda, x, weight.t().contiguous().t(), bias, LOW[low][0](down), LOW[low][1](up), dy)


@hopper_plans
def test_hopper_keeps_what_is_not_finite_in_its_row(tile, single, hopper_device, monkeypatch):
    hopper(monkeypatch, single, tile)
    x, weight, bias, down, up, dy = (t.abs() for t in make(200, 72, 264, 3, torch.bfloat16, hopper_device))
    x[150, 7] = float("inf")
    y, p = cuda.lowrank_linear(x, weight, bias, down, up)
    assert (y[150] == float("inf")).all() and (p[150] == float("inf")).all()
    assert torch.isfinite(y).sum() == 199 * 264 and torch.isfinite(p).sum() == 199 * 3


def check_passes(ops, dy, x, up, p) -> None:
    """Checks dp, ddown and dup of the kernel for compute capability 9.0 against the contract."""
    R = p.shape[1]
    # With the identity as down, followed by zeros, dx is dp.
    K = -(-R // 8) * 8
    eye, weight = torch.eye(K, R, dtype=dy.dtype, device=dy.device), torch.zeros(dy.shape[1], K, dtype=dy.dtype)
    dp, _ = ops.lowrank_linear_backward(dy, None, weight.to(dy.device), eye, up, p, False, True, 128)
    ddown, dup = ops.lowrank_linear_backward(dy, x, None, x[:1, :].t().expand(-1, R), up, p, False, True, 128)
    plain = dy @ up.t()
    assert_accurate(dp[:, :R], plain, dy.double() @ up.double().t(), "dp")
    assert (dp[:, R:] == 0).all()
    exact = x.double().t() @ (dy.double() @ up.double().t())
    assert_accurate(ddown, x.t() @ plain, exact, "ddown")
    assert_accurate(dup, p.t() @ dy, p.double().t() @ dy.double(), "dup")


def make_passes(M, K, N, R, dtype, device="cpu"):
    """Returns dy, x, up, p."""
    x, _, _, _, up, dy = make(M, K, N, R, dtype, device)
    return dy, x, up, torch.randn(M, R, device=device).to(dtype)


@dtypes
@shapes(
    (1, 8, 8, 1),
    (63, 136, 72, 3),
    (197, 96, 96, 16),
    (1100, 200, 192, 14),  # a run for each warpgroup; the last block has one only
    (1000, 72, 520, 16),
    (21000, 8, 64, 16),  # runs of several tiles of rows, the last one shorter
    (1000, 72, 640, 16),  # a cluster of two
    (530, 64, 768, 8),
    (70, 328, 1536, 16),
    (70, 1000, 2304, 16),
    (140, 776, 3072, 31),
    (70, 64, 4096, 16),
    (450, 400, 136, 17),
    (300, 64, 1000, 32),
    # other passes where those of hopper do not fit: too many columns of dy for a cluster, too many ranks, rows of x
    # that are not aligned to 16 bytes
    *((24, 200, 4104, 16), (24, 200, 3080, 17), (24, 200, 136, 33), (24, 201, 136, 5)),
    *((300, 192, N, R) for R in (1, 2, 5, 8, 11, 16, 20, 29, 32) for N in (128, 520)),
)
def test_hopper_passes(shape, dtype, hopper_device):
    check_passes(cuda.load(), *make_passes(*shape, dtype, hopper_device))


@pytest.mark.parametrize("shape", [(900, 384, 128, 16), (700, 136, 72, 24), (900, 768, 200, 14), (260, 2304, 768, 16)])
def test_hopper_passes_in_any_order(shape, hopper_device, request):
    """The same bits, with more tiles than stages and more rows than inboxes."""
    M, N, K, R = shape
    dy, x, up, p = make_passes(M, K, N, R, torch.bfloat16, hopper_device)
    runs = []
    for mode in ORDERS:
        if hopper_device == "cpu":
            request.getfixturevalue("simulated").mode(*mode)
        runs.append(cuda.load().lowrank_linear_backward(dy, x, None, x[:1].t().expand(-1, R), up, p, False, True, 128))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_hopper_passes_with_any_strides(hopper_device):
    """Strided rows of dy and x are aligned to 16 bytes; up and p are copied where they are not."""
    ops, at = cuda.load(), (torch.bfloat16, hopper_device)
    dy, x, up, p = make_passes(300, 136, 200, 12, *at)
    check_passes(ops, wider(dy, 8, 16), wider(x, 16, 8), wider(up, 1, 9), wider(p, 3, 2))
    check_passes(ops, dy, x, up.t().contiguous().t(), p.t().contiguous().t())


LEADING = {  # a tensor [rows, columns] as one with other leading dimensions, and whether a step leads from row to row
    "two": (lambda t: t.view(4, 6, -1), True),
    "three": (lambda t: t.view(2, 1, 12, -1), True),
    "apart": (lambda t: wider(t, 8, 8).unflatten(0, (4, 6)), True),
    "one row for all": (lambda t: t[:1].expand(24, -1).unflatten(0, (4, 6)), True),
    "every other": (lambda t: torch.cat([t, t], -1).view(4, 12, -1)[:, ::2], True),
    "turned": (lambda t: t.view(6, 4, -1).transpose(0, 1), False),
    "a part of each": (lambda t: t.view(4, 6, -1)[:, :5], False),
    "none": (lambda t: t.view(4, 6, -1)[:0], True),
}


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("hopper", [True, False])
def test_a_bound_call_takes_leading_dimensions(leading, hopper, hopper_device, monkeypatch):
    """The operators of the library on x [..., K] and dy [..., N] give what they give on their rows."""
    x, weight, bias, down, up, dy = make(24, 40, 64, 8, torch.bfloat16, hopper_device)
    hopper = hopper and leading != "one row for all"  # TMA reads no matrix whose rows overlap
    chosen = cuda.KernelPlan(False, hopper, 128)
    monkeypatch.setattr(cuda, "_plan", lambda *sizes, **more: chosen)
    shape, stepped = LEADING[leading]
    x, dy, needs = shape(x), shape(dy), [True, False, False, True, True]
    forward = cuda.bind_lowrank_linear(x, weight, bias, down, up)
    p = torch.empty(x.numel() // 40, 8, device=hopper_device).bfloat16()
    backward = cuda.bind_lowrank_linear_backward(dy, x, weight, down, up, p, needs)
    if not stepped:
        assert forward is None and backward is None
        return
    y, p = forward(x, weight, bias, down, up)
    rows, dy_rows = x.reshape(-1, 40).contiguous(), dy.reshape(-1, 64).contiguous()
    plain = cuda.lowrank_linear(rows, weight, bias, down, up)
    assert y.shape == (*x.shape[:-1], 64) and torch.equal(y.view(-1, 64), plain[0]) and torch.equal(p, plain[1])
    dx, *grads = backward(dy, x, weight, down, up, p, needs)
    dx_plain, *plain = cuda.lowrank_linear_backward(dy_rows, rows, weight, down, up, p, needs)
    assert dx.shape == (*x.shape[:-1], 40) and torch.equal(dx.view(-1, 40), dx_plain)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain))


def test_calls_that_are_not_bound(simulated):
    """A trained weight or bias, no gradient at all, a plan that is forced for a while."""
    x, weight, _, down, up, dy = make(24, 40, 64, 8, torch.bfloat16)
    for needs in ([True, True, False, True, True], [True, False, True, True, True], [False] * 5):
        assert cuda.bind_lowrank_linear_backward(dy, x, weight, down, up, None, needs) is None
    with table.override("cuda", cuda.KernelPlan(False, False, 64)._asdict()):
        assert cuda.bind_lowrank_linear(x, weight, None, down, up) is None
        # the tuner names the plan whose calls it times
        assert cuda.bind_lowrank_linear(x, weight, None, down, up, cuda.KernelPlan(True, True, 128)) is not None
    # a view of complex numbers may have to be negated when it is read
    half = torch.randn(24, 40, dtype=torch.complex32).conj().imag
    assert cuda.bind_lowrank_linear(half, *(t.half() for t in (weight, weight[:, 0], down, up))) is None
    assert not cuda._plain(half[0].unsqueeze(-1)) and cuda._plain(torch.randn(40, 1), None)
    with pytest.raises(RuntimeError, match="x must have one step from row to row"):
        cuda.load().lowrank_linear(x.view(6, 4, 40).transpose(0, 1), weight, None, down, up, False, False, 64)
    with pytest.raises(RuntimeError, match="x must have 24 rows of 40, got 12 of 40"):
        cuda.load().lowrank_linear_backward(dy, x[:12], weight, down, up, None, False, False, 64)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("bound", [True, False])
def test_freed_memory_is_refused_by_name(number, bound, simulated):
    x, weight, _, down, up, dy = make(24, 40, 64, 8, torch.bfloat16)
    given, p = [x, weight, torch.randn(64).bfloat16(), down, up], x @ down
    forward = cuda.bind_lowrank_linear(*given) if bound else cuda.lowrank_linear
    backward = cuda.lowrank_linear_backward
    needs = [True, False, False, True, True]
    if bound:
        backward = cuda.bind_lowrank_linear_backward(dy, x, weight, down, up, p, needs)
    given[number] = given[number].clone()
    given[number].untyped_storage().resize_(given[number].nbytes - 1)
    name = ("x", "weight", "bias", "down", "up")[number]
    says = f"{name} must have memory for all of its entries"
    refuses(RuntimeError, says, forward, *given)
    if name != "bias":
        x, weight, _, down, up = given
        refuses(RuntimeError, says, backward, dy, x, weight, down, up, p, needs)


def test_number_of_launches(simulated, monkeypatch):
    x, weight, bias, down, up, dy = make(130, 32, 72, 3, torch.bfloat16)
    sigma, v, dup = (torch.randn(s).bfloat16() for s in ((3, 4, 5), (5, 48), (3, 4, 48)))
    assert simulated.launches(cuda.group_update, sigma, v, 1.0) == 1
    assert simulated.launches(cuda.group_update_backward, dup, sigma, v, 1.0, [True, True]) == 1
    assert simulated.launches(cuda.merge_, [weight] * 5, [down] * 5, [up] * 5) == 1
    assert simulated.launches(cuda.merge_, [weight] * 257, [down] * 257, [up] * 257) == 2
    backward = dy, x, weight, down, up, x[:, :3], [True, False, False, True, True]
    for single, forward_launches, backward_launches in ((True, 1, 4), (False, 2, 4)):
        plan(monkeypatch, single, False)
        assert simulated.launches(cuda.lowrank_linear, x, weight, bias, down, up) == forward_launches
        assert simulated.launches(cuda.lowrank_linear_backward, *backward) == backward_launches


def test_shared_memory_is_within_the_budget(simulated, monkeypatch):
    most = {}
    for R, (single, large) in itertools.product((16, 32, 64, 256), itertools.product((True, False), repeat=2)):
        if single and R > cuda.MAX_RANK_BESIDE:
            continue
        x, weight, bias, down, up, dy = make(1, 8, 16, R, torch.bfloat16)
        plan(monkeypatch, single, large)
        name = f"lowrank_linear tile{128 if large else 64} {'single_pass' if single else 'extended_k'} R{R}"
        most[name] = simulated.shared(cuda.lowrank_linear, x, weight, bias, down, up)
        both = dy, x, None, down, up, torch.zeros(1, R, dtype=x.dtype), False, False, 64
        most[f"dp dup R{R}"] = simulated.shared(simulated.ops.lowrank_linear_backward, *both)
    for R, (tile, single) in itertools.product((16, 32, 64), HOPPER):
        if single and R > cuda.HOPPER_RANK_BESIDE:
            continue
        hopper(monkeypatch, single, tile)
        x, weight, bias, down, up, dy = make(8, 64, 64, R, torch.bfloat16)
        name = f"hopper_linear tile{tile} {'single_pass' if single else 'extended_k'} R{R}"
        most[name] = simulated.shared(cuda.lowrank_linear, x, weight, bias, down, up)
    for R, N in itertools.product((16, 32), (128, 768, 1536, 2304, 3072)):
        x, _, _, down, up, dy = make(8, 8, N, R, torch.bfloat16)
        both = dy, x, None, down, up, torch.zeros(8, R, dtype=x.dtype), False, True, 128
        most[f"hopper_pass N{N} R{R}"] = simulated.shared(simulated.ops.lowrank_linear_backward, *both)
    most["group_update"] = simulated.shared(cuda.group_update, down[None], up, 1.0)
    budget = json.loads(Path(simulator.HERE, "budget.json").read_text())["shared"]
    assert most == budget, json.dumps(most, indent=4)
    for name, size in most.items():  # the limits per block at compute capability 9.0, and 8.0
        assert size <= (227 if name.startswith("hopper") else 163) * 1024


@pytest.fixture(scope="session")
def faulty_library(built, tmp_path_factory) -> Simulated:
    """csrc/cuda with all the faults that a test may choose from."""
    return simulator.build_faulty(tmp_path_factory.mktemp("faults"), Path(built.library._name).parent)


@pytest.fixture
def faulty(request, built, tmp_path) -> Simulated:
    """csrc/cuda with the fault that the test's parameter names, or with none."""
    name = request.param
    if name in faults.CONSTANT:
        yield simulator.build_faulty(tmp_path, Path(built.library._name).parent, faults.CONSTANT[name])
        return
    library = request.getfixturevalue("faulty_library")
    library.plant(name)
    yield library
    library.plant(None)


def check_linear(faulty, monkeypatch) -> None:
    """Any order of events gives the right numbers."""
    x, weight, bias, _, _, dy = make(130, 330, 100, 16, torch.bfloat16)
    x, weight = LAYOUTS["aligned"](*x.shape, x.dtype, "cpu"), LAYOUTS["aligned"](*weight.shape, x.dtype, "cpu")
    down, up = torch.randn(330, 16).div(18).bfloat16(), torch.randn(16, 100).div(10).bfloat16()
    for single, mode in itertools.product((True, False), Simulated.MODES):
        plan(monkeypatch, single, False)
        faulty.mode(*mode)
        check_lowrank_linear(cuda, x, weight, bias, down, up, dy, (False,) * 5)


def check_hopper(kernels, monkeypatch) -> None:
    """Any order of events gives the right numbers."""
    # Numbers that are not finite; many tiles of one step each; a ring that wraps around and a block without columns,
    # which takes longest.
    cases = []
    for sizes, backward, infinite in (
        ((128, 64, 64, 14), False, True), ((900, 64, 384, 14), False, False), ((300, 328, 456, 14), True, False)
    ):  # fmt: skip
        x, weight, bias, down, up, dy = (t.abs() if infinite else t for t in make(*sizes, torch.bfloat16))
        x[20, 8] = float("inf") if infinite else 1
        plain = reference.lowrank_linear(x, weight, bias, down, up)
        cases.append((x, weight, bias, down, up, dy, plain, dy @ weight + (dy @ up.t()) @ down.t(), backward))
    # most faults show in the first order
    for mode, case, tile, single in itertools.product(ORDERS, cases, (192, 128), (True, False)):
        x, weight, bias, down, up, dy, plain, dx_plain, backward = case
        hopper(monkeypatch, single, tile)
        kernels.mode(*mode)
        y, p = cuda.lowrank_linear(x, weight, bias, down, up)
        pairs = [*zip((y, p), plain)]
        if backward and not single:
            needs = [True, False, False, False, False]
            pairs += [(*cuda.lowrank_linear_backward(dy, x, weight, down, up, p, needs), dx_plain)]
        assert all(torch.allclose(a, b, rtol=0.05, atol=0.05, equal_nan=True) for a, b in pairs)


def check_hopper_passes(kernels, monkeypatch) -> None:
    """Any order of events gives the right numbers."""
    # A run for each warpgroup, a cluster of two and of four; the rings wrap around.
    cases = []
    for M, N in ((17000, 128), (1300, 600), (660, 1536)):
        dy, x, up, p = make_passes(M, 128, N, 14, torch.bfloat16)
        dp = (dy.double() @ up.double().t()).to(dy.dtype).double()
        cases.append((dy, x, up, p, [x.double().t() @ dp, p.double().t() @ dy.double()]))
    for mode, (dy, x, up, p, exact) in itertools.product(ORDERS, cases[::-1]):
        kernels.mode(*mode)
        down = x[:1].t().expand(-1, 14)
        found = kernels.ops.lowrank_linear_backward(dy, x, None, down, up, p, False, True, 128)
        assert all((a.double() - b).norm() <= 0.01 * b.norm() for a, b in zip(found, exact))


CHECKS = {
    "linear.h": check_linear,
    "tile.h": check_linear,
    "hopper.h": check_hopper,
    "hopper_pass.h": check_hopper_passes,
}


@pytest.mark.parametrize("check", dict.fromkeys(CHECKS.values()))
@pytest.mark.parametrize("faulty", [None], indirect=True)
def test_no_fault_is_seen_where_there_is_none(check, faulty, monkeypatch):
    monkeypatch.setattr(cuda, "load", lambda: faulty.ops)
    check(faulty, monkeypatch)


@pytest.mark.parametrize("faulty", [*faults.PLANTED, *faults.CONSTANT], indirect=True)
def test_a_planted_fault_is_seen(faulty, request, monkeypatch):
    file, *_ = (faults.PLANTED | faults.CONSTANT)[request.node.callspec.params["faulty"]]
    monkeypatch.setattr(cuda, "load", lambda: faulty.ops)
    says = "could not be launched: block"  # as the simulator ends a launch
    with pytest.raises((AssertionError, RuntimeError)) as error:
        CHECKS[file](faulty, monkeypatch)
    assert isinstance(error.value, AssertionError) or says in str(error.value), error.value


@pytest.mark.parametrize(
    "M, N, R, dup, expected",
    [
        (12608, 768, 16, False, True),  # ViT-B proj: 16 * 768 < 184 * 128
        (12608, 2304, 16, False, False),  # qkv: 16 * 2304 > 184 * 128
        (12608, 768, 64, False, False),
        (200704, 96, 64, False, True),  # one tile spans the columns
        (12608, 96, 65, False, False),  # no accumulators for so many ranks
        (197, 2304, 16, False, True),  # few tiles
        (12608, 768, 16, True, False),  # the pass for dup computes dp
        (200704, 96, 16, True, True),
    ],
)
def test_where_p_is_formed(M, N, R, dup, expected):
    assert cuda.single_pass(M, N, R, cuda.RIDGE[9], dup) is expected


@pytest.mark.parametrize(
    "M, N, K, single, measured",
    [
        (12608, 2304, 768, True, (192, 128)),  # qkv of ViT-B: within 1 % of each other
        (12608, 768, 768, True, (192,)), (12608, 3072, 768, True, (128,)), (12608, 768, 3072, True, (192,)),
        (200704, 288, 96, True, (192,)), (200704, 384, 96, True, (192,)), (200704, 96, 384, True, (96, 128)),
        (50176, 576, 192, True, (128,)), (12544, 1152, 384, True, (128,)), (12608, 768, 2304, False, (192,)),
        (12608, 3072, 768, False, (128, 256)),
    ],
)  # fmt: skip
def test_the_formula_takes_the_tile_that_was_fastest_on_an_h200(M, N, K, single, measured):
    assert cuda.hopper_tile(M, N, K, 16, single) in measured


def test_tiles_fill_a_gpu():
    assert [cuda.tile(*sizes) for sizes in ((12608, 768), (197, 2304), (2048, 512))] == [128, 64, 64]


def test_refusals(monkeypatch):
    x, weight, bias, down, up, dy = make(8, 16, 24, 4, torch.bfloat16)
    ask = cuda.unsupported
    assert ask("mixed_linear", x, weight, bias, down, up, None) == "it has no kernels for mixed batches, triton has"
    single = [t.float() for t in (x, weight, bias, down, up)]
    assert "bfloat16 and float16 tensors, not torch.float32" in ask("lowrank_linear", *single)
    assert ask("lowrank_linear", x, weight, bias, down, up) == "it needs CUDA tensors, these are on cpu"
    # The module treats these tensors as if they were on a GPU.
    monkeypatch.setattr(cuda, "_unsupported_device", lambda device: None)
    assert ask("lowrank_linear", x, weight, bias, down, up) is None
    large = make(8, 300, 280, 257, torch.bfloat16)
    assert ask("lowrank_linear", *large[:5]) == "it goes to rank 256, not 257"
    backward = large[5], None, large[1], large[3], large[4], None
    assert ask("lowrank_linear_backward", *backward) == "it goes to rank 256, not 257"
    assert ask("group_update", *(torch.zeros(s).bfloat16() for s in ((1, 4, 257), (257, 8)))).endswith("not 257")
    far = x.as_strided((1, 16), (cuda.MAX_SIZE + 1, 1))
    assert "counts sizes and strides to" in ask("lowrank_linear", far, weight, bias, down, up)


@pytest.mark.slow
def test_the_build_refuses_what_it_does_not_know():
    setup = [sys.executable, simulator.CSRC.parents[1] / "setup.py", "--name"]
    done = subprocess.run(setup, env=os.environ | {"EFFT_CUDA": "yes"}, capture_output=True, text=True)
    assert done.returncode and "EFFT_CUDA must be 0, 1 or unset, got 'yes'" in done.stderr


def test_bad_arguments_of_the_operators(simulated):
    ops, tile, hopper = simulated.ops, (True, False, 64), (True, True, 192)
    x, weight, bias, down, up = good = make(8, 16, 24, 4, torch.bfloat16)[:5]
    ops.lowrank_linear(*good, *hopper)
    for given, plan, says in (
        ((x, weight[:, 1:], bias, down, up), tile, r"weight must be \[24, 16\], got \[24, 15\]"),
        ((x, weight, bias.half(), down, up), tile, "bias must have the dtype of the other tensors"),
        (make(8, 16, 24, 65, torch.bfloat16)[:5], tile, "must have at most 64 ranks, got 65"),
        ((wider(x, 1, 7), weight, bias, down, up), hopper, "hopper needs x, w and y with rows on 16 bytes"),
        ((x, weight[:23], None, down, up[:, :23]), hopper, "hopper needs x, w and y with rows on 16 bytes"),
        ((x, weight.t().contiguous().t(), bias, down, up), hopper, "only where weight has its rows side by side"),
        (make(8, 64, 64, 33, torch.bfloat16)[:5], hopper, "p beside y must have at most 32 ranks, got 33"),
        (good, (True, True, 64), "there are no tiles of 64 columns for hopper"),
        (good, (True, True, 256), "there are no tiles of 256 columns for hopper"),
        (good, (False, True, 96), "there are no tiles of 96 columns for hopper"),
        (good, (True, False, 192), "there are no tiles of 192 columns"),
    ):
        refuses(RuntimeError, says, ops.lowrank_linear, *given, *plan)
    refuses(RuntimeError, "the dtype must be bfloat16 or float16", ops.lowrank_p, x.float(), down.float())
    refuses(RuntimeError, "the lists must be of equal length", ops.merge_, [weight], [], [])
