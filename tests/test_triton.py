"""The Triton kernels: compiled where there is a GPU, through the interpreter on CPU tensors elsewhere."""

import importlib
import itertools
import os
import sys

import pytest
import torch
from accuracy import check_lowrank_linear
from operands import make, make_mixed, poison

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
poisoned = pytest.fixture(poison, autouse=True)


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


@pytest.mark.parametrize("single", [True, False], ids=["single_pass", "extended_k"])
@pytest.mark.parametrize("rows", [70, 65, 5, 1])
def test_where_p_of_a_mixed_batch_is_computed(rows, single, device, monkeypatch, launches):
    """Beside y where a tile can hold no more than two samples, otherwise in a separate pass."""
    force(monkeypatch, single)
    x, weight, bias, down, up, ids, _ = make_mixed(4, rows, 48, 24, 3, 4, torch.float16, device)
    kernels.mixed_linear(x, weight, bias, down, up, ids)
    assert ("p_kernel" in launches) == (not single or rows < 64)


def test_launches_of_a_mixed_batch_do_not_grow_with_it(device, launches, monkeypatch):
    force(monkeypatch, True)
    counts = []
    for B, A in ((2, 2), (9, 8)):
        x, weight, bias, down, up, ids, dy = make_mixed(B, 70, 32, 40, 3, A, torch.float16, device)
        launches.clear()
        _, p = kernels.mixed_linear(x, weight, bias, down, up, ids)
        assert launches == ["lowrank_linear_kernel"]
        kernels.mixed_linear_backward(dy, x, weight, down, up, p, ids, [True, False, False, True, True])
        counts.append(list(launches))
    assert counts[0] == counts[1] and len(counts[0]) == 6


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
    merged = [weight.clone(), weight[:, :3].clone()], [down, down[:3]], [up, up]
    assert launched(None, kernels.merge_, *merged) == ["merge_row"] * 2 + ["merge"]
    forward = kernels.lowrank_linear, x, weight, bias, down, up
    assert launched(True, *forward) == ["lowrank_linear"] and launched(False, *forward) == ["p", "lowrank_linear"]
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
    chosen = table.Choice("triton", 2.0, {"triton": 1.0}, {"triton": {"way": kernels.WAYS[not way]}})
    monkeypatch.setattr(table, "choice", lambda *of: chosen)
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
    assert 1 <= runs <= launch.cdiv(M, 64) and runs <= max(16, M // 1024)


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
    x, weight, bias, down, up, _ = make(4, 300, 310, 257, torch.float16, device)
    say = kernels.unsupported("lowrank_linear", x, weight, bias, down, up)
    assert "rank 256" in say and "257" in say
    assert "rank 256" in kernels.unsupported("merge_", weight, weight, down, down, up, up)
    assert "float64" in kernels.unsupported("group_update", torch.ones(1, 2, 3).double(), torch.ones(3, 4).double())
    small = [t.to(device) for t in (torch.ones(4, 2, 3), torch.ones(3, 4))]
    assert (kernels.unsupported("group_update", *small) is None) == kernels.INTERPRETED
    assert kernels.unsupported("group_update", *[t.half() for t in small]) is None
    far = torch.empty(3, device=device, dtype=torch.float16).as_strided((1, 3), (1 << 23, 1))
    assert "strides" in kernels.unsupported("lowrank_linear", far, far, None, far.t(), far)
    assert kernels.unavailable() is None


def test_rows_that_16_elements_do_not_divide_have_tiles_of_their_own(monkeypatch):
    aligned, parameter = torch.zeros(32, 48, dtype=torch.float16), torch.zeros(48, 8, dtype=torch.float16)
    assert not launch.ragged(aligned, None, aligned.t(), aligned[:, :7], torch.zeros(8).half().expand(3, 8))
    for tensor in (parameter, parameter.t(), aligned[:, 1:], aligned[:, ::3], aligned.flatten()[:50].view(2, 25)):
        assert launch.ragged(aligned, tensor)
    assert launch.config("p", aligned, 32, 8, 48, 8, True) == launch.config("p", aligned, 32, 8, 48, 8)  # interpreted
    monkeypatch.setattr(launch, "architecture", lambda tensor: "sm_90")
    for kernel, tiles in launch.DEFAULTS["ragged"].items():
        assert launch.config(kernel, aligned, 4096, 768, 768, 16, True) == tiles
        assert launch.config(kernel, aligned, 4096, 768, 768, 16) != tiles
        assert launch.config(kernel, aligned.float(), 4096, 768, 768, 16, True) != tiles


def test_every_default_is_complete():
    sizes = itertools.product([1, 197, 12608, 200704], [7, 96, 768, 3072], [1, 17, 64, 256], ["half", "tf32", "fp32"])
    for arch, (M, N, R, kind) in itertools.product(kernels.DEFAULTS["defaults"], sizes):
        for kernel in kernels.DEFAULTS["defaults"][arch]:
            use = launch.lookup(kernel, arch, kind, M, N, R)
            # without a row for it, p is not formed beside y
            assert use or (kernel == "single_pass" and (R > 64 or kind == "fp32")), (arch, kernel, kind, R)
            assert arch == "interpreter" or not use or {"num_warps", "num_stages"} <= use.keys()
        assert isinstance(linear.strategy(arch, kind, M, 768, N, R, False), bool)
