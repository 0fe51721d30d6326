"""The contract of kernels/__init__.py: the same cases for every backend, and for every way that one has to compute."""

import functools
import importlib
import itertools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accuracy import assert_accurate, check_group_update, check_lowrank_linear, check_mixed_linear
from operands import LAYOUTS, make, make_mixed, poison, within

from efft_kernels.kernels import cpu, cuda, reference
from efft_kernels.kernels.tuning import table
from efft_kernels.ops import dispatch

sys.path.insert(0, str(Path(__file__).parent / "cuda"))
import simulator

FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64
# edges of the blocks of the C++ kernels; and of tiles, with sizes that tensor descriptors can address and others
CPU_SHAPES = (
    (0, 8, 8, 2), (1, 100, 33, 1), (2, 7, 33, 3), (5, 33, 7, 16), (13, 100, 33, 17),
    (197, 100, 64, 16), (50, 300, 130, 64), (20, 1100, 40, 3), (33, 280, 290, 256), (9, 40, 300, 270),
)  # fmt: skip
TRITON_SHAPES = (
    (0, 32, 48, 3), (197, 100, 7, 3), (96, 64, 128, 16), (70, 128, 96, 17), (65, 48, 80, 64), (33, 40, 24, 1),
    (1, 64, 200, 64),
)  # fmt: skip
CUDA_SHAPES = (0, 32, 48, 3), (197, 100, 7, 3), (96, 64, 128, 16), (70, 136, 200, 17), (65, 48, 80, 64), (33, 40, 24, 1)
LARGEST_RANK = 24, 80, 72, 256
CPU_MIXED = (
    (3, 0, 8, 8, 2, 2), (1, 1, 100, 33, 1, 1), (4, 1, 7, 33, 3, 3), (5, 13, 33, 7, 16, 7), (3, 197, 100, 64, 17, 2),
    (6, 40, 1100, 40, 3, 4), (2, 9, 280, 290, 70, 2), (40, 3, 20, 30, 5, 33),
)  # fmt: skip
TRITON_MIXED = (
    (5, 197, 33, 40, 3, 3), (4, 70, 64, 96, 16, 2), (3, 65, 48, 24, 33, 4), (13, 5, 40, 24, 17, 6),
    (20, 1, 16, 8, 1, 5),
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to compute: a backend, with its choice among its own kernels fixed."""

    name: str
    module: ModuleType
    set_up: Callable  # of pytest's request and monkeypatch
    dtypes: tuple
    shapes: tuple
    mixed: tuple = ()
    device: str = "cpu"
    brief: bool = False  # differs from another way in the products of lowrank_linear alone
    mark: tuple = ()


def reference_ways():
    for last in (False, True):

        def set_up(request, monkeypatch, last=last):
            monkeypatch.setattr(reference, "_large_product_last", lambda a, N, K: last)

        name = f"reference-{'last' if last else 'first'}"
        yield Way(name, reference, set_up, FLOATS, CPU_SHAPES[:7], () if last else CPU_MIXED[:5], brief=last)


def cpu_ways():
    for isa in () if cpu.unavailable() else cpu.isas():

        def set_up(request, monkeypatch, isa=isa, rows=10**6):
            cpu.set_isa(isa)
            request.addfinalizer(lambda: cpu.set_isa(cpu.isas()[0]))
            monkeypatch.setattr(cpu, "_MANY_ROWS", {isa: rows})

        # the best set of instructions in every run of the tests, the others with all that is slow
        mark = () if isa == cpu.isas()[0] else (pytest.mark.slow,)
        yield Way(f"cpu-{isa}", cpu, set_up, FLOATS, CPU_SHAPES, CPU_MIXED, mark=mark)
        packing = functools.partial(set_up, rows=0)
        yield Way(f"cpu-{isa}-packing", cpu, packing, FLOATS, CPU_SHAPES[4:], CPU_MIXED[3:6], brief=True, mark=mark)


def triton_ways():
    module = dispatch.load("triton")[0]
    if module is None or module.unavailable():
        return
    if module.INTERPRETED:
        from interpreter import repair_bf16

        repair_bf16()
    linear = importlib.import_module(f"{module.__name__}.lowrank_linear")
    for single in (True, False):

        def set_up(request, monkeypatch, single=single):
            monkeypatch.setenv("EFFT_CACHE", str(request.getfixturevalue("tmp_path")))  # not the user's record
            table.invalidate()
            monkeypatch.setattr(linear, "single_pass", lambda *sizes: single)
            linear.strategy.cache_clear()
            request.addfinalizer(lambda: (table.invalidate(), linear.strategy.cache_clear()))

        name = f"triton-{'single_pass' if single else 'extended_k'}"
        # float32 is left to plain torch on a GPU
        device, dtypes = ("cpu", FLOATS[:3]) if module.INTERPRETED else ("cuda", FLOATS[1:3])
        shapes = (*TRITON_SHAPES, LARGEST_RANK)
        mixed = TRITON_MIXED[:3] if single else TRITON_MIXED  # few rows a sample are never in one pass
        yield Way(name, module, set_up, dtypes, shapes, mixed, device)


def cuda_ways():
    where = [] if simulator.compiler() is None else ["cpu"]
    where += [] if cuda.unavailable() else ["cuda"]
    for device, single, tile in itertools.product(where, (True, False), (cuda.SMALL_TILE, cuda.LARGE_TILE)):
        plan = cuda.KernelPlan(single, False, tile)

        def set_up(request, monkeypatch, device=device, plan=plan):
            if device == "cpu":
                kernels = simulator.loaded()
                monkeypatch.setattr(cuda, "load", lambda: kernels.ops)
                kernels.mode(False, False)
            monkeypatch.setattr(cuda, "_plan", lambda *sizes, **more: plan)

        name = f"cuda-{'simulator' if device == 'cpu' else 'gpu'}-{'single_pass' if single else 'extended_k'}-{tile}"
        shapes = CUDA_SHAPES if single else (*CUDA_SHAPES, LARGEST_RANK)
        brief = tile != cuda.SMALL_TILE
        # the simulator of a GPU takes half a minute to compile
        yield Way(name, cuda, set_up, FLOATS[1:3], shapes, (), device, brief, (pytest.mark.slow,))


WAYS = [*reference_ways(), *cpu_ways(), *triton_ways(), *cuda_ways()]
name_of = lambda value: str(value).removeprefix("torch.")


@pytest.fixture
def way(request, monkeypatch) -> Way:
    """A way that is set up."""
    poison(monkeypatch)
    request.param.set_up(request, monkeypatch)
    return request.param


def for_each(names: str = "", cases=lambda way: [()], brief: bool = True):
    """Parametrizes a test by ways, and the cases of each; ways that are brief only where the test asks for them."""
    chosen = [way for way in WAYS if brief or not way.brief]
    found = [
        pytest.param(way, *case, id="-".join([way.name, *map(name_of, case)]), marks=way.mark)
        for way in chosen
        for case in cases(way)
    ]
    return pytest.mark.parametrize(f"way, {names}" if names else "way", found, indirect=["way"])


def narrow(way: Way) -> torch.dtype:
    """The dtype of tests whose subject is not the dtype."""
    return torch.float32 if torch.float32 in way.dtypes else torch.float16


def cheap(way: Way) -> bool:
    """Triton's interpreter and the simulator compute slowly."""
    return way.device == "cuda" or way.module in (cpu, reference)


def some(way: Way) -> tuple:
    """All dtypes where they are cheap."""
    return way.dtypes if cheap(way) else (narrow(way),)


def in_dtypes(way: Way, shapes: tuple) -> list[tuple]:
    """Every shape in every dtype; where that is slow, two of them in all dtypes and each in one."""
    pairs = itertools.product(shapes, way.dtypes)
    return [(s, dtype) for s, dtype in pairs if cheap(way) or dtype == narrow(way) or s in shapes[1:3]]


def of_factors(way: Way, cases) -> list[tuple]:
    """The cases of ops that read no x, which both ways of Triton compute alike."""
    return [] if way.name == "triton-extended_k" else [*cases]


@for_each("shape, dtype", lambda way: in_dtypes(way, way.shapes))
def test_lowrank_linear(way, shape, dtype):
    x, weight, bias, down, up, dy = make(*shape, dtype, way.device)
    check_lowrank_linear(way.module, x, weight, bias, down, up, dy)
    if shape == way.shapes[2] or way.module is cpu:
        check_lowrank_linear(way.module, x, weight, None, down, up, dy, (False, False, False, True, False))


@for_each("layout, dtype", lambda way: itertools.product(LAYOUTS, some(way)), brief=False)
def test_any_strides(way, layout, dtype):
    at = dtype, way.device
    M, K, N, R = (72, 48, 80, 16) if layout == "turned" else (67, 50, 70, 17)
    bias = within(N, 1, *at)[:, 0]
    x, weight, down, up, dy = (LAYOUTS[layout](*size, *at) for size in ((M, K), (N, K), (K, R), (R, N), (M, N)))
    if layout == "repeated":  # otherwise the sums would grow with the rows
        weight, down, up = weight / N, down / K, up / R
    check_lowrank_linear(way.module, x, weight, bias, down, up, dy)


NEEDS = [*itertools.product([True, False], repeat=5)][1::3]


@for_each("needs", lambda way: [(needs,) for needs in NEEDS], brief=False)
def test_only_the_gradients_asked_for(way, needs):
    x, weight, bias, down, up, dy = make(40, 33, 48, 5, narrow(way), way.device)
    check_lowrank_linear(way.module, x, weight, bias, down, up, dy, needs)
    # the same without what only the other gradients read
    p = x @ down
    backward = lambda x, p: way.module.lowrank_linear_backward(dy, x, weight, down, up, p, list(needs))
    absent = backward(x if needs[1] or needs[3] else None, p if needs[4] else None)
    assert len(absent) == sum(needs)
    assert all(torch.equal(a, b) for a, b in zip(absent, backward(x, p), strict=True))


@for_each("dtype", lambda way: [(dtype,) for dtype in way.dtypes], brief=False)
def test_what_is_not_finite_stays_in_its_row(way, dtype):
    x, weight, bias, down, up, _ = (t.abs() for t in make(70, 40, 48, 3, dtype, way.device))
    x[5, 7], x[9, 3] = float("inf"), float("nan")
    y, p = way.module.lowrank_linear(x, weight, bias, down, up)
    # Triton's tiles multiply by the zeros that pad the ranks, which makes nan of inf in y
    assert not torch.isfinite(y[5]).any() if "triton" in way.name else (y[5] == float("inf")).all()
    assert (p[5] == float("inf")).all() and y[9].isnan().all() and p[9].isnan().all()
    assert torch.isfinite(y).sum() == 68 * 48 and torch.isfinite(p).sum() == 68 * 3


@for_each(brief=False)
def test_two_runs_are_bit_equal(way):
    # many runs of rows, several chunks of columns
    M, N = (500 if way.module is cuda else 300, 280) if cheap(way) or way.module is cuda else (150, 136)
    dtype = torch.float16 if torch.float16 in way.dtypes else narrow(way)
    x, weight, bias, down, up, dy = make(M, 32, N, 16, dtype, way.device)

    def run():
        y, p = way.module.lowrank_linear(x, weight, bias, down, up)
        return [y, p, *way.module.lowrank_linear_backward(dy, x, weight, down, up, p, [True] * 5)]

    with ThreadPoolExecutor(1) as pool:  # on a GPU a thread has no context before its first call
        second = pool.submit(run).result()
    assert all(torch.equal(a, b) for a, b in zip(run(), second))
    check_lowrank_linear(way.module, x, weight, bias, down, up, dy)


@for_each("dtype", lambda way: [(dtype,) for dtype in way.dtypes] * getattr(way.module, "OVERWRITES_X", False))
def test_dx_takes_the_place_of_x(way, dtype, request):
    request.addfinalizer(lambda: torch.set_num_threads(1))
    # one block of rows, whose columns two threads share; several blocks, also of columns
    for (M, K, N, R), name in itertools.product(((24, 520, 40, 5), (700, 70, 1100, 17)), ("lowrank", "mixed")):
        x, weight, _, down, up, dy = make(M, K, N, R, dtype, way.device)
        forward, compute = (getattr(way.module, f"{name}_linear{which}") for which in ("", "_backward"))
        factors, ids = (down, up), ()
        if name == "mixed":
            factors, ids = (torch.stack([down, -down]), torch.stack([up, up])), (torch.tensor([1, 0, -1, 0]),)
        p = forward(x, weight, None, *factors, *ids)[1]
        torch.set_num_threads(2 if M < 100 else 1)
        for trained in (False, True):
            needs = [True, trained, False, True, True]
            backward = lambda x, *over: compute(dy, x, weight, *factors, p, *ids, needs, *over)
            place, turned, want = x.clone(), x.t().contiguous().t(), backward(x)
            got = backward(place, True)
            overwritten = got[0].data_ptr() == place.data_ptr()
            assert all(map(torch.equal, got, want)) and torch.equal(place, want[0] if overwritten else x)
            if way.module is cpu:
                assert overwritten == (not trained and (M > 100 or name == "mixed"))  # of which each run is a task
            else:
                assert overwritten or reference._onednn_leads()
            assert all(map(torch.equal, backward(turned, True), backward(turned))) and torch.equal(turned, x)


@for_each("shape, dtype", lambda way: in_dtypes(way, way.mixed))
def test_mixed_linear(way, shape, dtype):
    x, weight, bias, down, up, ids, dy = make_mixed(*shape, dtype, way.device)
    check_mixed_linear(way.module, x, weight, bias, down, up, ids, dy)
    if way.name.startswith("cpu"):
        turned, few = x.t().contiguous().t(), (False, False, False, True, False)
        check_mixed_linear(way.module, turned, weight, None, down.mT.contiguous().mT, up, ids, dy, few)


@for_each("dtype", lambda way: [(dtype,) for dtype in some(way) * bool(way.mixed)])
def test_samples_beside_each_other_share_an_adapter(way, dtype):
    x, weight, bias, down, up, _, dy = make_mixed(8, 5, 33, 40, 3, 3, dtype, way.device)
    for order in ([1, 1, 1, 0, 0, -1, -1, 1], [2] * 8):
        check_mixed_linear(way.module, x, weight, bias, down, up, torch.tensor(order, device=way.device), dy)


def ranks(way):
    return of_factors(way, in_dtypes(way, ((1, 1), (3, 16), (17, 3), (64, 40), (256, 256))))


@for_each("ranks, dtype", ranks, brief=False)
def test_group_update(way, ranks, dtype):
    (P, Q), S, N = ranks, 5 if ranks[0] < 256 else 1, 52
    sigma, v, dup = (torch.randn(s, device=way.device).to(dtype) for s in ((S, P, Q), (Q, N), (S, P, N)))
    check_group_update(way.module, sigma, v, 10.0, dup)


GROUP_NEEDS = (True, True), (True, False), (False, True)


def transposed(way):
    return of_factors(way, itertools.product([(3, 17, 20, 50), (4, 16, 24, 72)], GROUP_NEEDS, some(way)))


@for_each("sizes, needs, dtype", transposed, brief=False)
def test_group_update_of_the_transposed_product(way, sizes, needs, dtype):
    # fc2: sigma.T and u.T, one slice of every second; its gradient arrives as a slice of a wider one
    S, P, Q, N = sizes
    at = dtype, way.device
    sigma = torch.randn(2 * S, Q, P, device=way.device).to(at[0])[::2].transpose(1, 2)
    dup = within(P, 2 * S * N, *at)[:, : 2 * S * N].unflatten(1, (2 * S, N)).transpose(0, 1)[1::2]
    check_group_update(way.module, sigma, within(N, Q, *at).t(), 0.1, dup, needs)


@for_each("dtype", lambda way: of_factors(way, [(dtype,) for dtype in way.dtypes]), brief=False)
def test_merge_of_several_weights(way, dtype):
    at = dtype, way.device
    sizes = [(130, 40, 3), (40, 130, 17), (64, 64, 16), (1, 7, 1), (33, 100, 1), (64, 64, 200)]
    sizes += [(24, 20, 300)] * (way.module in (cpu, reference))
    weights = [within(N, K, *at) for N, K, _ in sizes]
    weights[2] = weights[2].contiguous().t()
    downs = [within(K, R, *at) for _, K, R in sizes]
    ups = [within(N, R, *at).t() for N, _, R in sizes]
    exact = [w.double() + (down.double() @ up.double()).t() for w, down, up in zip(weights, downs, ups)]
    plain = [w.clone() for w in weights]
    reference.merge_(plain, downs, ups)
    way.module.merge_(weights, downs, ups)
    for triple in zip(weights, plain, exact):
        assert_accurate(*triple, "weight")
    # nothing outside the weights was written
    assert torch.isfinite(weights[0]._base).sum() == weights[0].numel()
    way.module.merge_([], [], [])
