"""The Triton kernels: compiled where there is a GPU, through the interpreter on CPU tensors elsewhere."""

import importlib
import itertools
import os
import sys

import pytest
import torch
from accuracy import assert_accurate, check_group_update, check_lowrank_linear, check_mixed_linear

from efft_kernels.kernels import reference

triton = pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from efft_kernels.kernels import triton as kernels
from efft_kernels.kernels.triton import launch
from efft_kernels.kernels.tuning import table

# modules, whose names the package gives to functions
linear, dy_pass = (importlib.import_module(f"{kernels.__name__}.{name}") for name in ("lowrank_linear", "dy_pass"))

if kernels.INTERPRETED:
    from interpreter import repair_bf16

    repair_bf16()

pytestmark = pytest.mark.skipif(kernels.unavailable() is not None, reason=str(kernels.unavailable()))
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """memory that no kernel writes is nan, or an integer that is no index and no address, and never zero by luck"""
    empty = torch.empty

    def poisoned(*size, **options):
        found = empty(*size, **options)
        return found.fill_(float("nan") if found.is_floating_point() else torch.iinfo(found.dtype).min)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def own_table(monkeypatch, tmp_path):
    """no test reads or writes the record of the user who runs it"""
    with monkeypatch.context() as patch:
        patch.setenv("EFFT_CACHE", str(tmp_path))
        table.invalidate()
        yield
    table.invalidate()


def force(monkeypatch, single: bool) -> None:
    """compute p inside the matmul or in a separate pass, whatever the rule says (where the tiles allow the first)"""
    monkeypatch.setattr(linear, "single_pass", lambda *sizes: single)
    linear.strategy.cache_clear()


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """the kernels launched since the test began"""
    names = []

    class Counted:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for module in [module for path, module in sys.modules.items() if path.startswith(f"{kernels.__name__}.")]:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), name))
    return names


def make(M, K, N, R, dtype, device):
    """x, weight, bias, down, up, dy"""
    shapes = (M, K), (N, K), (N,), (K, R), (R, N), (M, N)
    return [torch.randn(s, device=device).mul_(s[-1] ** -0.5).to(dtype) for s in shapes]


def within(rows, cols, dtype, device):
    """a slice of a wider buffer that is nan elsewhere"""
    buffer = torch.full((rows + 4, cols + 9), float("nan"), dtype=dtype, device=device)
    buffer[1 : 1 + rows, 3 : 3 + cols] = torch.randn(rows, cols, device=device).mul_(cols**-0.5).to(dtype)
    return buffer[1 : 1 + rows, 3 : 3 + cols]


# sizes that no tile divides, sizes that tensor descriptors can address, and every width of rank block
SHAPES = [(197, 100, 7, 3), (96, 64, 128, 16), (70, 128, 96, 17), (65, 48, 80, 64), (33, 40, 24, 1), (1, 64, 200, 64)]


@dtypes
@pytest.mark.parametrize("single", [True, False], ids=["single_pass", "extended_k"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "M{}-K{}-N{}-R{}".format(*shape))
def test_lowrank_linear_either_way(shape, single, dtype, device, monkeypatch):
    force(monkeypatch, single)
    x, weight, bias, down, up, dy = make(*shape, dtype, device)
    check_lowrank_linear(kernels, x, weight, bias, down, up, dy)


@dtypes
def test_lowrank_linear_of_the_largest_rank(dtype, device):
    x, weight, _, down, up, dy = make(24, 80, 72, 256, dtype, device)
    check_lowrank_linear(kernels, x, weight, None, down, up, dy)


@pytest.mark.parametrize("single", [True, False], ids=["single_pass", "extended_k"])
@pytest.mark.parametrize("needs", [*itertools.product([True, False], repeat=5)][1::3], ids=str)
def test_only_the_gradients_asked_for(needs, single, device, monkeypatch):
    force(monkeypatch, single)
    x, weight, bias, down, up, dy = make(40, 33, 48, 5, torch.float32, device)
    check_lowrank_linear(kernels, x, weight, bias, down, up, dy, needs)


@pytest.mark.parametrize("single", [True, False], ids=["single_pass", "extended_k"])
@pytest.mark.parametrize("layout", ["slices", "transposed", "steps"])
def test_any_strides(layout, single, device, monkeypatch):
    force(monkeypatch, single)
    place = {
        "slices": lambda rows, cols: within(rows, cols, torch.float32, device),
        "transposed": lambda rows, cols: within(cols, rows, torch.float32, device).t(),
        "steps": lambda rows, cols: within(2 * rows, 3 * cols, torch.float32, device)[::2, ::3],
    }[layout]
    M, K, N, R = 67, 50, 70, 17
    bias = within(N, 1, torch.float32, device)[:, 0]
    check_lowrank_linear(kernels, place(M, K), place(N, K), bias, place(K, R), place(R, N), place(M, N))


def test_no_rows(device):
    x, weight, bias, down, up, dy = make(0, 32, 48, 3, torch.float32, device)
    check_lowrank_linear(kernels, x, weight, bias, down, up, dy)


@pytest.mark.parametrize("single", [True, False], ids=["single_pass", "extended_k"])
def test_two_runs_are_bit_equal(single, device, monkeypatch):
    force(monkeypatch, single)
    # many splits of the rows, several chunks of the columns
    x, weight, bias, down, up, dy = make(300, 32, 80, 16, torch.float16, device)

    def run():
        y, p = kernels.lowrank_linear(x, weight, bias, down, up)
        return [y, p, *kernels.lowrank_linear_backward(dy, x, weight, down, up, p, [True, False, False, True, True])]

    assert all(torch.equal(first, second) for first, second in zip(run(), run()))
    check_lowrank_linear(kernels, x, weight, bias, down, up, dy)


def make_mixed(B, T, K, N, R, A, dtype, device):
    """x, weight, bias, down, up, ids, dy; the last adapter has no sample, some samples have none"""
    x, weight, bias, _, _, dy = make(B * T, K, N, R, dtype, device)
    down, up = (torch.randn(s, device=device).mul_(s[1] ** -0.5).to(dtype) for s in ((A, K, R), (A, R, N)))
    return x, weight, bias, down, up, torch.arange(B, device=device) * 7 % A - 1, dy


@dtypes
@pytest.mark.parametrize("single", [True, False], ids=["single_pass", "extended_k"])
@pytest.mark.parametrize(
    "shape",
    [
        (5, 197, 33, 40, 3, 3),
        (4, 70, 64, 96, 16, 2),
        (3, 65, 48, 24, 33, 4),
        (13, 5, 40, 24, 17, 6),
        (40, 1, 16, 8, 1, 5),
    ],
    ids=lambda shape: "B{}-T{}-K{}-N{}-R{}-A{}".format(*shape),
)
def test_mixed_linear_either_way(shape, single, dtype, device, monkeypatch, launches):
    force(monkeypatch, single)
    x, weight, bias, down, up, ids, dy = make_mixed(*shape, dtype, device)
    check_mixed_linear(kernels, x, weight, bias, down, up, ids, dy)
    # p inside the product where a tile can hold no more than two samples, in a pass of its own elsewhere
    assert ("p_kernel" in launches) == (not single or shape[1] < 64)


def test_launches_of_a_mixed_batch_do_not_grow_with_it(device, launches, monkeypatch):
    force(monkeypatch, True)
    counts = []
    for B, A in ((2, 2), (9, 8)):
        x, weight, bias, down, up, ids, dy = make_mixed(B, 70, 32, 40, 3, A, torch.float32, device)
        launches.clear()
        _, p = kernels.mixed_linear(x, weight, bias, down, up, ids)
        assert launches == ["lowrank_linear_kernel"]
        kernels.mixed_linear_backward(dy, x, weight, down, up, p, ids, [True, False, False, True, True])
        counts.append(list(launches))
    assert counts[0] == counts[1] and len(counts[0]) == 6


@dtypes
@pytest.mark.parametrize(
    "ranks", [(1, 1), (3, 16), (17, 3), (64, 40), (256, 256)], ids=lambda ranks: "P{}-Q{}".format(*ranks)
)
def test_group_update(ranks, dtype, device):
    (P, Q), S, N = ranks, 5 if ranks[0] < 256 else 1, 52
    sigma, v, dup = (torch.randn(s, device=device).to(dtype) for s in ((S, P, Q), (Q, N), (S, P, N)))
    check_group_update(kernels, sigma, v, 10.0, dup)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=str)
def test_group_update_of_the_transposed_product(needs, device):
    # fc2: sigma.T and u.T, one slice of every second; its gradient comes in as a slice of a wider one
    S, P, Q, N = 3, 17, 20, 50
    sigma = torch.randn(2 * S, Q, P, device=device)[::2].transpose(1, 2)
    dup = within(P, 2 * S * N, torch.float32, device).view(P, 2 * S, N).transpose(0, 1)[1::2]
    check_group_update(kernels, sigma, within(N, Q, torch.float32, device).t(), 0.1, dup, needs)


@dtypes
def test_merge_of_several_weights(dtype, device, launches):
    shapes = [(130, 40, 3), (40, 130, 17), (64, 64, 16), (1, 7, 1)]
    weights = [within(N, K, dtype, device) for N, K, _ in shapes]
    weights[2] = weights[2].contiguous().t()
    downs = [within(K, R, dtype, device) for _, K, R in shapes]
    ups = [within(N, R, dtype, device).t() for N, _, R in shapes]
    exact = [w.double() + (down.double() @ up.double()).t() for w, down, up in zip(weights, downs, ups)]
    plain = [w.clone() for w in weights]
    reference.merge_(plain, downs, ups)
    kernels.merge_(weights, downs, ups)
    assert launches == ["merge_row_kernel"] * len(weights) + ["merge_kernel"]
    for triple in zip(weights, plain, exact):
        assert_accurate(*triple, "weight")
    # nothing beside the weights was written
    whole = weights[0]._base
    assert torch.isfinite(whole).sum() == weights[0].numel()
    kernels.merge_([], [], [])


def test_number_of_launches(device, launches, monkeypatch):
    x, weight, bias, down, up, dy = make(64, 32, 72, 3, torch.float32, device)
    sigma, v, dup = (torch.randn(s, device=device) for s in ((3, 4, 5), (5, 48), (3, 4, 48)))

    def launched(single, call, *arguments):
        force(monkeypatch, single)
        launches.clear()
        call(*arguments)
        return [name.removesuffix("_kernel") for name in launches]

    assert launched(None, kernels.group_update, sigma, v, 1.0) == ["group_update"]
    assert launched(None, kernels.group_update_backward, dup, sigma, v, 1.0, [True, True]) == ["group_update_backward"]
    forward = kernels.lowrank_linear, x, weight, bias, down, up
    assert launched(True, *forward) == ["lowrank_linear"]
    assert launched(False, *forward) == ["p", "lowrank_linear"]
    backward = kernels.lowrank_linear_backward, dy, x, weight, down, up, x[:, :3], [True, False, False, True, True]
    assert launched(True, *backward) == ["lowrank_linear", "dy_pass", "dy_pass", "reduce_slots"]
    assert launched(False, *backward) == ["dy_pass", "reduce_slots", "lowrank_linear", "dy_pass", "reduce_slots"]


@pytest.mark.parametrize(
    "M, N, K, R, dup, expected",
    [
        (12608, 2304, 768, 16, False, True),  # ViT-B qkv: 16 < 184 * 256 / 2304
        (12608, 3072, 768, 16, False, False),  # fc1: 16 > 184 * 256 / 3072
        (12608, 768, 768, 32, False, True),  # proj
        (12608, 768, 768, 64, False, False),
        (200704, 200, 96, 16, True, True),  # one tile spans the columns
        (12608, 768, 2304, 16, True, False),  # the pass over dy that dup needs gives dp too
        (197, 2304, 768, 32, False, True),  # few tiles
    ],
)
def test_which_way_p_is_formed(M, N, K, R, dup, expected):
    assert linear.single_pass(M, N, K, R, BN=256, ridge=184, dup=dup) is expected


@pytest.mark.parametrize("way", [True, False], ids=["single_pass", "extended_k"])
def test_the_measured_way_goes_before_the_rule(way, device, launches, monkeypatch):
    x, weight, bias, down, up, dy = make(40, 48, 64, 5, torch.float16, device)
    monkeypatch.setattr(
        table,
        "choice",
        lambda *of: table.Choice("triton", 2.0, {"triton": 1.0}, {"triton": {"way": kernels.WAYS[not way]}}),
    )
    kernels.lowrank_linear(x, weight, bias, down, up)
    assert len(launches) == (1 if way else 2)
    launches.clear()
    check_lowrank_linear(kernels, x, weight, bias, down, up, dy)
    # ranks that no tile has registers for
    x, weight, bias, down, up, dy = make(40, 80, 72, 65, torch.float16, device)
    check_lowrank_linear(kernels, x, weight, bias, down, up, dy)


@pytest.mark.parametrize("M", [1, 63, 197, 12608, 200704])
@pytest.mark.parametrize("N", [7, 768, 3072])
def test_rows_are_split_by_shape_into_tiles_at_most(M, N):
    runs = dy_pass.splits(M, N, 16, BM=64, BN=256)
    assert 1 <= runs <= launch.cdiv(M, 64)
    assert runs <= max(16, M // 1024)


def test_tf32_only_where_torch_was_allowed_it(device):
    x, setting = torch.zeros(1, device=device), torch.backends.cuda.matmul.fp32_precision
    assert launch.precision(x) == "ieee"
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert launch.precision(x) == "tf32" and launch.kind_of(x) == "tf32"
        assert launch.precision(x.half()) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = setting


def test_refusals(device):
    x, weight, bias, down, up, _ = make(4, 300, 310, 257, torch.float32, device)
    say = kernels.unsupported("lowrank_linear", x, weight, bias, down, up)
    assert "rank 256" in say and "257" in say
    assert "rank 256" in kernels.unsupported("merge_", weight, weight, down, down, up, up)
    assert "float64" in kernels.unsupported("group_update", torch.ones(1, 2, 3).double(), torch.ones(3, 4).double())
    small = [t.to(device) for t in (torch.ones(4, 2, 3), torch.ones(3, 4))]
    assert kernels.unsupported("group_update", *small) is None
    far = torch.empty(3, device=device).as_strided((1, 3), (1 << 23, 1))
    assert "strides" in kernels.unsupported("lowrank_linear", far, far, None, far.t(), far)
    assert kernels.unavailable() is None


def test_every_default_is_complete():
    sizes = itertools.product([1, 197, 12608, 200704], [7, 96, 768, 3072], [1, 17, 64, 256], ["half", "tf32", "fp32"])
    for arch, (M, N, R, kind) in itertools.product(kernels.DEFAULTS["defaults"], sizes):
        for kernel in kernels.DEFAULTS["defaults"][arch]:
            use = launch.lookup(kernel, arch, kind, M, N, R)
            # without a row for it, p is not formed beside y
            assert use or (kernel == "single_pass" and (R > 64 or kind == "fp32")), (arch, kernel, kind, R)
            assert arch == "interpreter" or not use or {"num_warps", "num_stages"} <= use.keys()
        assert isinstance(linear.strategy(arch, kind, M, 768, N, R, False), bool)
