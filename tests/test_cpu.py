"""The C++ kernels: each instruction set of this processor against float64, bit-equality, kept panels of weights."""

import copy
import gc
import itertools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accuracy import assert_accurate, check_group_update, exactly
from operands import make, make_mixed
from refusals import refuses

from efft_kernels import lowrank_linear
from efft_kernels.kernels import build, cpu, cpu_rules, processor, reference
from efft_kernels.ops import few_rows

if reason := cpu.unavailable():
    pytest.skip(reason, allow_module_level=True)

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
ISAS = cpu.isas()


@pytest.fixture(params=ISAS)
def isa(request):
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(ISAS[0])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "slice", "steps"])
def test_a_few_rows_from_left_to_right(isa, threads, dtype, layout):
    """y and the gradients of x, u, sigma, v, in all layouts, where columns are shared between threads and where not."""
    threads(3)
    torch.manual_seed(0)
    lay = {
        "contiguous": lambda t: t,
        "transposed": lambda t: t.mT.contiguous().mT,
        "slice": lambda t: torch.nn.functional.pad(t, (3, 5))[..., 3:-5],
        "steps": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    }[layout]
    for shape, N, S, P, Q in (
        ((7,), 5, 1, 3, 2), ((2, 33), 20, 3, 4, 9), ((4, 100), 330, 4, 16, 16), ((7, 1, 64), 24, 2, 17, 5),
        ((16, 300), 130, 1, 3, 8), ((13, 40), 70, 1, 3, 2), ((3, 2, 40), 9, 1, 1, 1),
    ):  # fmt: skip
        random = lambda *size: torch.randn(size).div(size[-1] ** 0.5).to(dtype)
        K = shape[-1]
        x, weight, u, v = random(*shape), lay(random(S * N, K)), lay(random(K, P)), lay(random(Q, N))
        sigma = lay(random(S, P, Q)[0 if S == 1 else ...])
        bias, dy = random(S * N), random(*shape[:-1], S * N)
        if x.dim() == 2:
            x, dy = lay(x), lay(dy)

        def formula(x, weight, bias, u, sigma, v, dy):
            leaves = x, u, sigma, v = [t.detach().requires_grad_() for t in (x, u, sigma, v)]
            q = x @ u @ sigma if sigma.dim() == 2 else (x @ u).unsqueeze(-2).unsqueeze(-2) @ sigma
            low = (q @ v).reshape(*x.shape[:-1], -1)
            y = torch.nn.functional.linear(x, weight, bias) + 0.7 * low
            return y, *torch.autograd.grad(y, leaves, dy)

        given = x, weight, bias, u, sigma, v, dy
        exact, summed = (formula(*(change(t.double()) for t in given)) for change in (lambda t: t, torch.abs))
        for module in (reference, cpu):
            y, p, q = module.few_rows(x, weight, bias, u, sigma, v, 0.7)
            got = y, *module.few_rows_backward(dy, x, weight, u, sigma, v, p, q, 0.7, [True] * 4)
            for name, *results in zip(("y", "dx", "du", "dsigma", "dv"), got, formula(*given), exact, summed):
                *compared, most = results
                what = f"{name} of {shape} by {module.__name__}"
                assert_accurate(*(t.detach() for t in compared), what, most.detach())
        threads(1)
        assert torch.equal(y, cpu.few_rows(x, weight, bias, u, sigma, v, 0.7)[0]), "the same bits with one thread"
        threads(3)


@pytest.mark.parametrize("modules", [*itertools.product((cpu, reference), repeat=2)], ids=lambda m: "")
def test_between_its_products_a_few_rows_of_float16_have_the_range_of_float32(isa, modules):
    """p, q or dq is beyond float16, and the results are not"""
    torch.manual_seed(0)
    cases = (1e4, 1, 1e-4, 1e-3, 1), (10, 3e3, 1, 1e-2, 1e-4), (1e-3, 1e-3, 3e3, 1e2, 0.02)
    for M, (of_u, core, of_v, of_dy, scale) in itertools.product((1, 16), cases):
        random = lambda std, *size: torch.randn(size).mul_(std).half()
        x, weight, dy = random(1, M, 200), random(0.1, 120, 200), random(of_dy, M, 120)
        u, v = random(of_u, 200, 5), random(of_v, 4, 40)
        forward = x, weight, None, u, (sigma := random(core, 3, 5, 4)), v, scale
        y, p, q = modules[0].few_rows(*forward)
        got = y, *modules[1].few_rows_backward(dy, x, weight, u, sigma, v, p, q, scale, [True] * 4)
        exact = exactly("efft_linear", (*forward, dy))
        for name, result, right in zip(("y", "dx", "du", "dsigma", "dv"), got, exact):
            assert_accurate(result, torch.from_numpy(right).half(), right, f"{name} of {M} rows")
    for of_sigma, of_v, of_dup, scale in ((1e3, 1e-4, 1e-3, 1e3), (1, 1e2, 1e3, 1e-4)):
        sigma, v, dup = random(of_sigma, 3, 5, 4), random(of_v, 4, 40), random(of_dup, 3, 5, 40)
        check_group_update(modules[0], sigma, v, scale, dup)


def test_a_few_rows_that_do_not_fit_are_left_to_the_caller():
    sizes = (2, 6), (15, 6), (6, 2), (3, 2, 4), (4, 5)
    x, weight, u, sigma, v = (torch.randn(size) for size in sizes)
    good = x, weight, torch.randn(15), u, sigma, v, 1.0
    assert len(cpu.few_rows(*good)) == 3
    for i, wrong in (
        (0, x[:, :5]), (0, x.double()), (0, x.to_sparse()), (1, weight[:10]), (2, torch.randn(14)), (3, u[:5]),
        (3, u[:, :1].expand(6, 1 << 50)), (4, sigma[:2]), (4, sigma[0]), (5, v[:3]), (5, v.int()),
    ):  # fmt: skip
        given = *good[:i], wrong, *good[i + 1 :]
        assert not cpu.few_rows(*given) and not few_rows._fit(*given[:-1]), f"argument {i}"
    assert few_rows._fit(*good[:-1]) and not few_rows._fit(*good[:3], None, sigma, v)
    assert not few_rows._fit(x, weight[:0], None, u, sigma, v[:, :0])
    u.untyped_storage().resize_(0)
    for module in (cpu, reference):
        refuses(RuntimeError, "u must have memory", module.few_rows, *good)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinity_of_up_reaches_the_gradient_of_down_as_one(isa, dtype):
    """whatever is in the rows that fill a tile up"""
    for M, R in itertools.product((1, 2, 7, 13, 197), (2, 40)):
        x, weight, _, down, up, dy = make(M, 24, 16, R, dtype)
        x, dy, up[1, 3] = x.abs() + 0.1, dy.abs() + 0.1, float("inf")
        needs = [False, False, False, True, False]
        got, want = (m.lowrank_linear_backward(dy, x, weight, down, up, None, needs)[0] for m in (cpu, reference))
        assert (got[:, 1] == float("inf")).all() and torch.equal(got.isfinite(), want.isfinite())


def test_a_wide_p_is_summed_in_short_chains(isa):
    """2^24 + 1 is 2^24 in float32: one chain over all of x would lose every one that follows"""
    x = torch.ones(3, 256)
    x[:, 0] = 2**24
    _, p = cpu.lowrank_linear(x, torch.zeros(8, 256), None, torch.ones(256, 70), torch.zeros(70, 8))
    assert p.min() >= 2**24 + 190


@pytest.mark.parametrize(
    ("rules", "rows", "entries", "dtype", "ways"),
    [
        ("not measured", 1, 16, torch.float32, "torch"), ("not measured", 1, 128, torch.int64, None),
        ("_amd_avx512", 16, 1024, torch.float32, None), ("_amd_avx512", 1, 16, torch.float32, None),
        ("_avx2", 16, 1024, torch.float32, "kernel"), ("_avx2", 16, 1024, torch.float16, None),
        ("_intel_avx512", 2, 2048, torch.float32, "kernel"), ("_intel_avx512", 2, 2048, torch.float16, "kernel torch"),
        ("_intel_avx512", 4, 2048, torch.bfloat16, "kernel"), ("_intel_avx512", 5, 2048, torch.float16, "torch"),
        ("_intel_avx512", 9, 362, torch.float16, "kernel"), ("_intel_avx512", 13, 1024, torch.float32, "kernel"),
        ("_intel_avx512", 4, 2048, torch.float16, "torch"), ("_intel_avx512", 1, 128, torch.int64, None),
        ("_intel_avx512", 16, 2048, torch.bfloat16, "kernel"), ("_intel_avx512", 8, 2048, torch.float64, "kernel"),
    ],
)  # fmt: skip
def test_how_a_few_rows_are_multiplied(monkeypatch, rules, rows, entries, dtype, ways):
    """The way of the forward, and that of the backward where it is another one."""
    monkeypatch.setattr(cpu_rules, "of", lambda isa: getattr(cpu_rules, rules, rules))
    x, weight = torch.ones(rows, entries, dtype=dtype), torch.ones(entries, entries)
    first, *second = ways.split() if ways else [None]
    assert cpu.for_few_rows(x, weight, False) == first
    assert cpu.for_few_rows(x, weight, True) == (second[0] if second else first)


def test_a_mixed_batch_does_not_depend_on_threads(isa, threads):
    results = []
    for count in (1, 2, 3):
        torch.manual_seed(0)
        threads(count)
        x, weight, bias, down, up, _, dy = make_mixed(9, 50, 300, 200, 16, 5, torch.float32)
        ids = torch.arange(9) // 2 * 5 % 6 - 1  # neighbours share adapters, some samples have none, one is unused
        y, p = cpu.mixed_linear(x, weight, bias, down, up, ids)
        needs = [True, False, False, True, True]
        results.append([y, p, *cpu.mixed_linear_backward(dy, x, weight, down, up, p, ids, needs)])
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


def test_the_library_refuses_ids_that_would_leave_the_memory():
    x, weight, bias, down, up, ids, dy = make_mixed(3, 4, 8, 8, 2, 2, torch.float32)
    for bad in (torch.tensor([0, 1, 2]), ids[:2].int(), ids[::2], ids[:, None], torch.arange(5) * 0):
        refuses(RuntimeError, "ids", cpu.mixed_linear, x, weight, bias, down, up, bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_is_read_and_rounded_as_torch_does(isa, dtype):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    if dots := isa == "avx512_bf16" and dtype == torch.bfloat16:  # the instruction takes and makes no subnormals
        values = values[values.abs() >= torch.finfo(dtype).tiny]
    x = values[:, None]
    y, _ = cpu.lowrank_linear(x, torch.ones(1, 1, dtype=dtype), None, *[torch.zeros(1, 1, dtype=dtype)] * 2)
    assert torch.equal(y, x)
    third = torch.full((1, 1), 1 / 3).to(dtype)
    y, _ = cpu.lowrank_linear(x, third, None, *[torch.zeros(1, 1, dtype=dtype)] * 2)
    product = x.float() * third.float()
    if dots:
        product[product.abs() < torch.finfo(torch.float32).tiny] = 0
    assert torch.equal(y, product.to(dtype))


def everything(x, weight, bias, down, up, dy):
    y, p = cpu.lowrank_linear(x, weight, bias, down, up)
    return y, p, *cpu.lowrank_linear_backward(dy, x, weight, down, up, p, [True, False, False, True, True])


@pytest.mark.parametrize("shape", [(197, 100, 64, 16), (700, 300, 200, 3), (20, 30, 600, 5)], ids=str)
def test_bits_depend_on_neither_run_nor_threads(shape, threads):
    tensors = make(*shape)
    threads(1)
    first = everything(*tensors)
    for count in (1, 2, 3, 7):
        threads(count)
        assert all(map(torch.equal, first, everything(*tensors)))


def test_concurrent_calls(threads):
    tensors = [make(60, 100, 64, 16) for _ in range(2)]
    tensors[1] = (tensors[1][0], tensors[0][1], *tensors[1][2:])  # one frozen weight, two adapters
    wanted = [everything(*t) for t in tensors]

    def work(i):
        for _ in range(50):
            cpu.clear_packed()
            assert all(map(torch.equal, everything(*tensors[i]), wanted[i]))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (0, 1)))


@pytest.fixture
def kept():
    cpu.clear_packed()
    yield
    cpu.keep_packed(True)


def right(x, weight, bias, down, up):
    got = cpu.lowrank_linear(x, weight, bias, down, up)[0]
    return torch.allclose(got, reference.lowrank_linear(x, weight, bias, down, up)[0], atol=1e-4)


def test_panels_are_kept_and_dropped(kept):
    *tensors, dy = make(20, 64, 96, 3)
    assert right(*tensors) and cpu.packed_bytes() == 64 * 96 * 4
    assert right(*tensors) and cpu.packed_bytes() == 64 * 96 * 4
    everything(*tensors, dy)
    assert cpu.packed_bytes() == 2 * 64 * 96 * 4
    cpu.clear_packed()
    everything(*make(300, 64, 96, 3)[:1], *tensors[1:], torch.randn(300, 96))  # a backward of many rows keeps nothing
    assert cpu.packed_bytes() == 64 * 96 * 4
    del tensors[1]
    gc.collect()
    assert cpu.packed_bytes() == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2), lambda w: w.data.mul_(2), lambda w: w.data.copy_(torch.randn_like(w)),
        lambda w: w.numpy().__imul__(2), lambda w: w[5, 7].fill_(100),  # one value: only the version counter sees it
        lambda w: w.data[31].fill_(3), lambda w: w.data[:, 61].fill_(3),  # behind the counter's back: a row, a column
        lambda w: setattr(w, "data", torch.randn(48, 64)), lambda w: setattr(w, "data", torch.randn(64, 48).t()),
    ],
)  # fmt: skip
def test_a_changed_weight_is_packed_again(kept, change):
    *tensors, _ = make(20, 64, 48, 3)
    assert right(*tensors)
    change(tensors[1])
    assert right(*tensors)


def test_weights_that_the_garbage_collector_frees_at_any_moment(kept):
    class Cycle:
        pass

    *tensors, _ = make(20, 64, 48, 3)
    before = gc.get_threshold()
    gc.set_threshold(1)  # a collection at nearly every allocation, those under the lock included
    try:
        for _ in range(50):
            cycle = Cycle()
            cycle.itself, cycle.weight = cycle, tensors[1].clone()
            cpu.lowrank_linear(tensors[0], cycle.weight, *tensors[2:])
            cpu.packed_bytes()
    finally:
        gc.set_threshold(*before)
    del cycle
    gc.collect()
    assert cpu.packed_bytes() == 0


def test_panels_under_many_threads(kept, monkeypatch):
    """weights are created and freed, and panels dropped and counted, while other threads compute"""
    wrong, stop = [], time.monotonic() + 1
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: wrong.append(raised.exc_value))  # in a weak reference
    x, _, bias, down, up, dy = make(3, 8, 8, 2)
    shared = torch.randn(8, 8)

    def work(job):
        while time.monotonic() < stop:
            job()

    def compute():
        for weight in (shared, torch.randn(8, 8)):
            everything(x, weight, bias, down, up, dy)
            assert right(x, weight, bias, down, up)

    jobs = [compute] * 4 + [cpu.clear_packed, cpu.packed_bytes]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(jobs)) as pool:
            list(pool.map(work, jobs))
    finally:
        sys.setswitchinterval(before)
    assert not wrong
    cpu.clear_packed()
    assert right(x, shared, bias, down, up) and cpu.packed_bytes() == cpu._panels(shared, False).nbytes


def test_panels_that_another_thread_drops_between_any_two_steps(kept, monkeypatch):
    class Dropped(dict):
        def look(self, found):
            self.clear()
            return found

        def get(self, *args):
            return self.look(super().get(*args))

        def __contains__(self, key):
            return self.look(super().__contains__(key))

    raised = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: raised.append(what.exc_value))
    monkeypatch.setattr(cpu, "_packed", Dropped())
    *tensors, _ = make(20, 64, 48, 3)
    assert all(right(*tensors) for _ in range(3)) and cpu._packed
    del tensors
    gc.collect()
    assert not raised and not cpu._packed


def test_what_is_not_kept(kept):
    *tensors, _ = make(20, 64, 48, 3)
    tensors[1].requires_grad_()
    assert right(*tensors) and cpu.packed_bytes() == 0
    tensors[1].requires_grad_(False)
    cpu.keep_packed(False)
    assert right(*tensors) and cpu.packed_bytes() == 0


def test_inference_tensors_and_copies(kept):
    with torch.inference_mode():
        tensors = make(20, 64, 48, 3)[:5]
        assert right(*tensors)
        tensors[1][5, 7] = 100
        assert right(*tensors) and cpu.packed_bytes() == 0
    *tensors, _ = make(20, 64, 48, 3)
    assert right(*tensors)
    tensors[1] = copy.deepcopy(tensors[1])
    tensors[1] += 1
    assert right(*tensors)


def test_panels_of_two_casts_of_a_weight_are_not_confused(kept):
    x, weight, bias, down, up, _ = make(20, 64, 48, 3)
    weight = torch.nn.Parameter(weight, requires_grad=False)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            y, want = (lowrank_linear(x, weight, bias, down, up, backend=b) for b in ("cpu", "reference"))
        torch.testing.assert_close(y, want, rtol=0.05, atol=0.05)


def test_the_cast_that_a_backward_reads_leaves_no_panels(kept):
    weight = torch.nn.Parameter(torch.randn(64, 96).t(), requires_grad=False)
    cast = weight.bfloat16()
    cast.efft_cast_of = weight
    weight.detach().neg_()  # after the forward
    assert torch.equal(cpu._of_backward(cast, 40), cpu._load()[0].pack(cast, True)) and not cpu.packed_bytes()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """a c++ that logs its arguments and writes an empty file, and a separate home folder"""
    script = tmp_path / "c++"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
                      'while [ "$1" != -o ]; do shift; done\n: > "$2"\n')  # fmt: skip
    script.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("CXX", "EFFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return lambda: (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize("cxx, first", [(None, "-std=c++17"), ("", "-std=c++17"), (" ", "-std=c++17"),
                                        ("c++ -m64 '-DX=1 2'", "-m64 -DX=1 2 -std=c++17")])  # fmt: skip
def test_the_compiler_and_its_flags(cxx, first, compiler, monkeypatch):
    if cxx is not None:
        monkeypatch.setenv("CXX", cxx)
    build.compile_library("cpu", "the CPU kernels")
    probe, *compiled, linked = compiler()
    sources = [*(build.csrc() / "cpu").glob("*.cpp"), "sources.cpp"]  # the last one holds the digest of the others
    assert len(compiled) == len(sources) and all(call.startswith(f"{first} ") for call in [probe, *compiled])
    assert linked.startswith(first.replace("-std=c++17", "-shared"))


def test_a_compiled_library_is_kept_in_the_cache_folder_and_compiled_once(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFT_CACHE", str(tmp_path / "own"))
    library = build.compile_library("cpu", "the CPU kernels")
    assert library.parent == tmp_path / "own" and library.exists()
    calls = len(compiler())
    assert build.compile_library("cpu", "the CPU kernels") == library and len(compiler()) == calls


def test_a_compiler_that_fails_or_is_missing(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    refuses(RuntimeError, "false failed", build.compile_library, "cpu", "the CPU kernels")
    assert not list(tmp_path.glob(".cache/efft_kernels/*"))
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    refuses(RuntimeError, "no C\\+\\+ compiler", build.compile_library, "cpu", "the CPU kernels")


def test_a_library_of_other_sources_is_not_used(tmp_path, monkeypatch):
    """by the digest that is compiled in, whatever the times of the files are"""
    library = tmp_path / "_cpu.so"
    monkeypatch.setattr(cpu, "_PACKAGE", tmp_path)
    monkeypatch.setattr(build, "compile_library", lambda part, about: "compiled")
    marks = (build.MARK + digest + b"\0" for digest in (build.digest(build.csrc() / "cpu").encode(), b"0" * 32))
    for mark, used in zip((*marks, b""), (library, "compiled", "compiled")):
        build.carried.cache_clear()
        library.write_bytes(b"\x7fELF" + mark)
        assert cpu._library() == used


def test_refusals():
    x, weight, bias, down, up, _ = make(4, 8, 8, 2)
    assert cpu.unsupported("lowrank_linear", x, weight, bias, down, up) is None
    assert "int64" in cpu.unsupported("lowrank_linear", x.long(), weight, bias, down, up)
    assert "meta" in cpu.unsupported("lowrank_linear", x.to("meta"), weight, bias, down, up)
    refuses(RuntimeError, r"down must be \[8, 2\], got \[2, 8\]", cpu.lowrank_linear, x, weight, bias, down.t(), up)
    refuses(RuntimeError, "isa must be one of", cpu.set_isa, "none such")


def test_the_compiled_operators_refuse_what_would_crash():
    ops, z = torch.ops.efft_cpu, torch.zeros
    packed = ops.pack(z(8, 8), False)
    for call in (
        lambda: ops.group_update(z(2, 3, 0), z(0, 4), 1.0),
        lambda: ops.group_update(z(2, 3), z(3, 4), 1.0),
        lambda: ops.group_update_backward(z(2, 3, 0), z(2, 3, 4), z(4, 0), 1.0, True, True),
        lambda: ops.merge_([z(4, 4)], [z(4, 0)], [z(0, 4)]),
        lambda: ops.pack(z(0, 8), False),
        lambda: ops.pack(z(8), False),
        lambda: ops.fingerprint(z(8)),
        lambda: ops.fingerprint(z(8, 8, dtype=torch.complex128)),
        lambda: ops.lowrank_linear(z(8), packed, None, z(8, 2), z(2, 8)),
        lambda: ops.lowrank_linear(z(3, 8), packed, None, z(8, 0), z(0, 8)),
        lambda: ops.lowrank_linear(z(3, 8), z(1, dtype=torch.uint8).expand(packed.numel()), None, z(8, 2), z(2, 8)),
        lambda: ops.lowrank_linear(z(3, 8), z(packed.numel()), None, z(8, 2), z(2, 8)),
        lambda: ops.lowrank_linear_backward(z(3, 0), None, None, z(8, 2), z(2, 0), None),
    ):
        refuses(RuntimeError, "must", call)


@pytest.fixture
def on_processor(monkeypatch):
    """makes this processor one with these words in /proc/cpuinfo"""

    def become(*words):
        monkeypatch.setattr(processor, "words", lambda: words)
        cpu_rules.of.cache_clear()

    yield become
    cpu_rules.of.cache_clear()


@pytest.fixture
def rules(isa, on_processor):
    """slower() by shape and dtype, as on the processors that each instruction set was measured on"""
    on_processor("GenuineIntel" if isa == "avx512" else "AuthenticAMD")
    return lambda op, *tensors, needs=None: cpu.slower(op, *tensors, needs=needs)


def test_plain_torch_where_it_is_as_fast(isa, rules):
    slower = lambda M, K, N, dtype: rules("lowrank_linear", *make(M, K, N, 4, dtype)[:5])
    if isa == "portable":
        assert "not been measured" in slower(197, 768, 768, torch.float32)
        return
    if isa == "avx512":
        assert "MKL" in slower(197, 768, 768, torch.float32)
        assert slower(197, 768, 768, torch.bfloat16) is slower(197, 768, 768, torch.float16) is None
        assert slower(1, 768, 768, torch.bfloat16) is None and "1 rows" in slower(1, 768, 768, torch.float16)
        assert "too small" in slower(3136, 64, 64, torch.bfloat16)
        x, weight, _, down, up, dy = make(64, 1024, 768, 4, torch.bfloat16)
        asked = lambda dx: rules("lowrank_linear_backward", dy, x, weight, down, up, needs=[dx, 0, 0, 1, 1])
        assert asked(True) is None and "factors" in asked(False)
        return
    assert slower(197, 768, 768, torch.float32) is None and slower(197, 3072, 768, torch.float32) is None
    assert slower(788, 3072, 768, torch.bfloat16) is None and slower(2, 64, 64, torch.bfloat16) is None
    assert rules("merge_", *make(1, 8, 8, 2)[1:4]) is not None
    assert rules("merge_", *make(1, 8, 8, 2, torch.bfloat16)[1:4]) is None
    trained = make(197, 768, 768, 4)
    assert "trained" in rules("lowrank_linear", trained[0], trained[1].requires_grad_(), *trained[2:5])
    if isa == "avx2":
        assert "1 rows" in slower(1, 768, 768, torch.float32)
        assert "too small" in slower(197, 64, 64, torch.float32)
        assert "in blocks" in slower(788, 3072, 768, torch.float32)
    else:
        assert slower(1, 768, 768, torch.float32) is None and slower(1, 768, 768, torch.bfloat16) is None
        assert "1 rows" in slower(1, 64, 64, torch.bfloat16)
        assert "too small" in slower(3136, 64, 64, torch.bfloat16)
        backward = lambda M: rules("lowrank_linear_backward", *(make(M, 768, 768, 4)[i] for i in (5, 0, 1, 3, 4)))
        assert backward(64) is None and backward(1) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rules_of_the_other_products(isa, rules, dtype):
    if isa == "portable" or (isa == "avx512" and dtype.itemsize > 2):
        return
    rows = lambda M: make(M, 768, 256, 4, dtype)

    def mixed(rows_each):
        x, weight, bias, down, up, dy = rows(4 * rows_each)
        downs, ups, ids = down.expand(3, -1, -1), up.expand(3, -1, -1), torch.tensor([0, 1, 2, -1])
        forward = rules("mixed_linear", x, weight, bias, downs, ups, ids)
        return forward, rules("mixed_linear_backward", dy, x, weight, downs, ups, x @ down, ids)

    assert mixed(197) == (None, None) and all("rows" in reason for reason in mixed(1))


def test_rules_of_one_make_are_not_those_of_another(on_processor):
    for isa, word in (("avx512_bf16", "GenuineIntel"), ("avx512", "AuthenticAMD"), ("neon", "")):
        on_processor(word)
        assert "not been measured" in cpu_rules.of(isa)
    on_processor("GenuineIntel", "amx_tile")
    assert "AMX" in cpu_rules.of("avx512")
    on_processor("GenuineIntel", "avx512_fp16")
    assert "AVX512-FP16" in cpu_rules.of("avx512")("lowrank_linear", None, *make(197, 768, 768, 4, torch.float16)[:5])
    on_processor("GenuineIntel")
    rules = cpu_rules.of("avx512")
    zeros = lambda *size: torch.zeros(size, dtype=torch.bfloat16)

    def merge(R, *widths):
        given = [zeros(768, K) for K in widths] + [zeros(K, R) for K in widths] + [zeros(R, 768)] * len(widths)
        return rules("merge_", None, *given)

    def group(op, S):
        dup = [zeros(S, 16, 768)] if op.endswith("backward") else []
        return rules(op, None, *dup, zeros(S, 16, 16), zeros(16, 768))

    assert merge(16, 768) is merge(64, 96, 768) is None and merge(65, 768, 768) and merge(16, 96, 96)
    assert group("group_update", 48) is group("group_update_backward", 49) is None and group("group_update", 49)


@pytest.mark.skipif("avx512_bf16" not in ISAS, reason="this processor has no dot product of bfloat16")
def test_the_instruction_set_that_is_used_first():
    assert ISAS[0] == ("avx512" if processor.intel() else "avx512_bf16")
