"""Proof and tuning: what is recorded, when a record counts, what is chosen, and what a wrong or hanging kernel does."""

import contextlib
import errno
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from refusals import refuses

from efft_kernels import tune as command
from efft_kernels.kernels import build, cpu_rules, cuda, reference
from efft_kernels.kernels.tuning import children, plans, prove, run, shapes, table, timing, tune, worker
from efft_kernels.ops import dispatch

CPU = torch.device("cpu")
PLAN = {"single_pass": True, "hopper": False, "tile": 128}
SIZES = 200, 96, 64, 8  # M, N, K, R
FORWARD = table.key(table.LINEAR, torch.bfloat16, 64, 96, 8)
BACKWARD = table.key(table.BACKWARD, torch.bfloat16, 64, 96, 8, table.ALL)
WORKER = Path(__file__).with_name("planted_worker.py")


@pytest.fixture(autouse=True)
def own_files(tmp_path, monkeypatch):
    """both files in the test's folder, the driver's version as given, and the CPU in the place of a GPU"""
    monkeypatch.setenv("EFFT_CACHE", os.environ.get("EFFT_CACHE", ""))  # and back to it afterwards
    build.own_cache(tmp_path / "user")
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(table, "_unwritten", {"format": table.FORMAT, "devices": {}})
    table.invalidate()
    yield tmp_path
    monkeypatch.undo()
    table.invalidate()


def name() -> str:
    return table.device_name(CPU)


def proof(*proven: dict, **other) -> dict:
    found = table.conditions("cuda", CPU) | {"date": "2026-01-01", "dropped": {}}
    return {"cuda": found | {"plans": {table.plan_name(plan): {"bfloat16": 40} for plan in proven}} | other}


def row(plan=PLAN, us=1.0, torch_us=2.0, host=None, torch_host=None) -> dict:
    found = {"torch": torch_us, "cuda": {"us": us, "plan": plan}}
    if host:
        found |= {"torch_host": torch_host, "cuda": {"us": us, "host": host, "plan": plan}}
    return found


def write(path: Path, proof: dict, measured: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    devices = {name(): {"proof": proof, "measured": measured}}
    path.write_text(json.dumps({"format": table.FORMAT, "devices": devices}))
    table.invalidate()


def make(M, N, K, R):
    """x, weight, bias, down, up, dy, p"""
    sizes = (M, K), (N, K), (N,), (K, R), (R, N), (M, N), (M, R)
    return [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]


def planned(M=200, needs=None):
    _, N, K, R = SIZES
    x, weight, _, _, _, dy, _ = make(M, N, K, R)
    op, first = (table.LINEAR, x) if needs is None else (table.BACKWARD, dy)
    return cuda._plan(op, first, weight, R, needs)


def test_ranks_that_cost_the_same_share_an_entry():
    key = functools.partial(table.key, "a", torch.float16)
    assert key(96, 768, 5) == key(96, 768, 16) == "a float16 K96 N768 R16"
    assert key(96, 768, 17).endswith("R32")
    assert key(9, 7, 1, [False, False, True, True, True]).endswith("needs down,up")


def test_a_choice_needs_a_gain_of_three_percent():
    write(table.user_file(), proof(PLAN), {FORWARD: {"200": row(us=1.95), "100": row(us=1.9)}})
    assert table.choice(CPU, FORWARD, 200).backend is None and table.choice(CPU, FORWARD, 100).backend == "cuda"


def test_a_choice_keeps_the_host_no_longer_than_plain_torch_does_unless_the_device_takes_longer():
    hosts = {"100": (3.0, 2.5), "200": (2.0, 1.0), "300": (3, 3)}
    rows = {M: row(host=host, torch_host=torch_host) for M, (host, torch_host) in hosts.items()}
    write(table.user_file(), proof(PLAN), {FORWARD: rows})
    assert [table.choice(CPU, FORWARD, M).backend for M in (100, 200, 300)] == [None, "cuda", "cuda"]
    x, weight, bias, down, up, _, _ = make(100, 96, 64, 8)
    assert "the host longer" in table.slower("cuda", table.LINEAR, (x, weight, bias, down, up))


def test_between_two_sizes_that_are_chosen_alike_it_is_chosen_too():
    other = PLAN | {"tile": 64}
    rows = {"100": row(), "400": row(other), "900": row(other, us=3.0)}
    write(table.user_file(), proof(PLAN, other), {FORWARD: rows})
    found = {M: table.choice(CPU, FORWARD, M) for M in (50, 100, 150, 300, 500, 900, 1000)}
    assert [M for M, choice in found.items() if choice and choice.backend] == [100, 150, 300]
    assert found[150].plans["cuda"] == PLAN and found[300].plans["cuda"] == other
    assert found[50] is None and found[500] is None and found[1000] is None and found[900].backend is None


@pytest.mark.parametrize("changed", ["sources", "driver", "torch", "triton"])
def test_a_record_is_void_once_what_it_was_made_with_has_changed(changed, own_files, monkeypatch):
    write(table.user_file(), proof(PLAN), {FORWARD: {"200": row()}})
    assert table.unproven("cuda", CPU) is None and planned() == cuda.KernelPlan(**PLAN)
    write(table.user_file(), proof(PLAN, **{changed: "another"}), {FORWARD: {"200": row()}})
    reason = table.unproven("cuda", CPU)
    assert ("other sources" if changed == "sources" else f"with {changed} another") in reason
    assert table.COMMAND in reason
    assert table.choice(CPU, FORWARD, 200) is None and planned() == cuda.KernelPlan(True, False, 64)
    # a shipped record was made elsewhere, with whatever driver was there
    table.user_file().unlink()
    write(table.SHIPPED, proof(PLAN, **{changed: "another"}), {FORWARD: {"200": row()}})
    assert (table.choice(CPU, FORWARD, 200) is not None) is (changed == "driver")


def test_the_users_file_goes_first_and_deleting_it_undoes_the_choice():
    slow = row(us=3.0)
    write(table.SHIPPED, proof(PLAN), {FORWARD: {"200": slow}})
    assert table.choice(CPU, FORWARD, 200).backend is None
    assert table.save(name(), proof(PLAN), {FORWARD: {"200": row()}}) is None
    assert table.choice(CPU, FORWARD, 200).backend == "cuda"
    table.user_file().unlink()
    table.invalidate()
    assert table.choice(CPU, FORWARD, 200).backend is None


def test_a_new_proof_takes_the_times_of_other_sources_away():
    timed = row() | {"triton": {"us": 3.0, "plan": {}}}
    write(table.user_file(), proof(PLAN, sources="old"), {FORWARD: {"200": timed}})
    table.save(name(), proof({"op": "merge_"}))
    found = json.loads(table.user_file().read_text())["devices"][name()]
    assert found["proof"]["cuda"]["plans"] == {"merge_": {"bfloat16": 40}}
    assert found["measured"][FORWARD]["200"] == {"torch": 2.0, "triton": {"us": 3.0, "plan": {}}}
    # with the same sources plans are added, and a dropped one is proven no more
    table.save(name(), proof(PLAN))
    table.save(name(), proof(dropped={"merge_": "it hung"}))
    found = table.proof("cuda", CPU)
    assert found["plans"] == {table.plan_name(PLAN): {"bfloat16": 40}} and found["dropped"] == {"merge_": "it hung"}


def test_a_full_disk_leaves_the_old_file_and_the_choice_in_this_process(monkeypatch):
    table.save(name(), proof(PLAN), {FORWARD: {"100": row()}})
    before = table.user_file().read_text()

    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        reason = table.save(name(), measured={FORWARD: {"200": row()}})
    assert "No space left on device" in reason and str(table.user_file()) in reason
    assert table.user_file().read_text() == before
    left = {path.name for path in table.user_file().parent.iterdir() if path.suffix != ".so"}
    assert left == {"tuned.json", "tuned.lock"} and table.choice(CPU, FORWARD, 200).backend == "cuda"


@pytest.mark.slow
def test_two_processes_at_once_lose_nothing():
    code = """
import sys
from efft_kernels.kernels.tuning import table
for i in range(20):
    table.save("a device", measured={f"{sys.argv[1]} {i}": {"1": {"torch": 1.0}}})
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, which]) for which in ("first", "second")]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    assert len(json.loads(table.user_file().read_text())["devices"]["a device"]["measured"]) == 40


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "[" * 100000 + "]" * 100000, '{"format": 4, "devices": {}}', '{"format": 2, "devices": {}}',
        '{"format": 3, "devices": [1]}', '{"format": 3, "devices": {"a": {}}}',
        '{"format": 3, "devices": {"a": {"proof": {"cuda": {}}, "measured": {}}}}', *(
            '{"format": 3, "devices": {"a": {"proof": {}, "measured": {"b float32": {"1": ROW}}}}}'.replace("ROW", row)
            for row in ('{"torch": "fast"}', '{"torch": Infinity}', '{"torch": 1, "cuda": {"us": 1}}',
                        '{"torch": 1, "cpu": {"us": 1, "plan": {}}}',
                        '{"torch": 1, "cpu": {"us": 1, "plan": {"isa": "avx2"}, "a": [[[[[[[[[[1]]]]]]]]]]}}')
        ),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_ignored_with_a_warning_and_kept(text):
    table.user_file().parent.mkdir(exist_ok=True)
    table.user_file().write_text(text)
    table.invalidate()
    with pytest.warns(UserWarning, match=f"{table.user_file()} .*it is ignored"):
        assert table.choice(CPU, FORWARD, 1) is None
    with pytest.warns(UserWarning, match="it is kept as tuned"):
        assert table.save(name(), proof(PLAN)) is None
    (kept,) = table.user_file().parent.glob("tuned.[0-9]*.json")
    assert kept.read_text() == text and table.proof("cuda", CPU)["plans"]


def test_a_file_that_cannot_be_read_now_is_not_replaced(monkeypatch):
    table.save(name(), proof(PLAN))
    before, read = table.user_file().read_bytes(), Path.read_text

    def stale(path, *given):
        if path == table.user_file():
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path, *given)

    monkeypatch.setattr(Path, "read_text", stale)
    assert "Stale file handle" in table.save(name(), measured={FORWARD: {"200": row()}})
    assert table.user_file().read_bytes() == before


def test_what_is_on_record_goes_by_the_number_of_threads_and_by_the_dtype():
    other = FORWARD.replace("bfloat16", "float16")
    write(table.user_file(), proof(PLAN), {FORWARD: {"200": row()}, other: {"200": row()}})
    assert table.choice(CPU, FORWARD, 200).backend == "cuda" and table.choice(CPU, other, 200) is None
    threads = torch.get_num_threads()
    try:
        job = {"task": "prove", "device": "cpu", "backend": "cpu", "plans": [], "dtypes": []}
        assert not list(worker.events(job | {"threads": threads + 1}))  # a child takes the number of its parent
        assert table.choice(CPU, FORWARD, 200) is None and not table.proof("cuda", CPU)["plans"]
    finally:
        torch.set_num_threads(threads)


def test_the_shipped_file_is_written_as_it_stands_and_fits(monkeypatch):
    monkeypatch.undo()
    text = table.SHIPPED.read_text()
    found = json.loads(text)
    assert table.lines(found) + "\n" == text and found["format"] == table.FORMAT
    table._checked(found["devices"])
    for device in found["devices"].values():
        for rows in device["measured"].values():
            for each in rows.values():
                assert "cuda" not in each or each["cuda"]["plan"].keys() in ({"op"}, set(PLAN))


def test_digests_go_by_what_is_computed_not_by_what_is_said_about_it(tmp_path):
    one, two = tmp_path / "a.py", tmp_path / "b.py"
    one.write_text('"""A."""\nimport os\ndef f(x):\n    """B"""\n    return x + 1  # c\ndef g(): pass\n')
    before = build.python_digest([one])
    one.write_text("def g(): pass\n")
    two.write_text("from . import c\ndef f(x):\n    return x+1\n")
    assert build.python_digest([one, two]) == before
    two.write_text("def f(x):\n    return x + 2\n")
    assert build.python_digest([one, two]) != before
    source = tmp_path / "a.cu"
    source.write_text('int a = 1; // one\n/* two */ auto b = "// three";')
    before = build.digest(tmp_path)
    source.write_text('int a = 1;\nauto b = "// three"; // four')
    assert build.digest(tmp_path) == before
    source.write_text('int a = 1;\nauto b = "// five";')
    assert build.digest(tmp_path) != before


def test_a_plan_on_record_goes_before_the_formula():
    formula, other = planned(), PLAN | {"single_pass": False}
    assert formula == cuda.KernelPlan(True, False, 64)
    write(table.user_file(), proof(PLAN, other), {FORWARD: {"200": row()}, BACKWARD: {"200": row(other)}})
    assert planned() == cuda.KernelPlan(**PLAN) and planned(needs=table.ALL) == cuda.KernelPlan(**other)
    assert planned(M=199) == planned(M=201) == formula
    with table.override("cuda", PLAN | {"tile": 64}):
        assert planned() == cuda.KernelPlan(True, False, 64)


@pytest.mark.parametrize("single", [True, False])
def test_a_hopper_plan_goes_by_the_operands(single):
    hopper = {"single_pass": single, "hopper": True, "tile": 192}
    write(table.user_file(), proof(hopper), {FORWARD: {"200": row(hopper)}})
    _, N, K, R = SIZES
    x, weight, bias, down, up, _, _ = make(*SIZES)
    assert planned() == cuda.KernelPlan(**hopper) and cuda.slower(table.LINEAR, x, weight, bias, down, up) is None
    off = torch.zeros(200 * K + 1, dtype=x.dtype)[1:].view(200, K)
    apart = torch.zeros(200, K + 4, dtype=x.dtype)[:, :K]
    for other in (off, apart, torch.zeros(200, 2 * K, dtype=x.dtype)[:, ::2], x[:1].expand(200, K)):
        for given, w in ((other, weight), (x, other[:N])):
            assert not cuda._plan(table.LINEAR, given, w, R).hopper
            assert "not been measured" in cuda.slower(table.LINEAR, given, w, bias, down, up)
    # p is not formed beside y for a weight the other way round
    assert cuda._plan(table.LINEAR, x, weight.t().contiguous().t(), R).hopper is not single


def test_a_plan_that_this_gpu_cannot_run_is_an_error_that_names_the_file():
    for plan in (PLAN | {"tile": 96}, PLAN | {"hopper": True, "tile": 64}, {"single_pass": True}):
        write(table.user_file(), proof(plan), {FORWARD: {"200": row(plan)}})
        says = f"{table.user_file()}: the plan of lowrank_linear for M 200.* must be one of"
        refuses(ValueError, says, planned)


def test_slower_unless_on_record_as_faster():
    x, weight, bias, down, up, dy, p = make(*SIZES)
    forward, backward = (x, weight, bias, down, up), (dy, x, weight, down, up, p)
    write(table.user_file(), proof(PLAN), {})
    assert "not been measured for lowrank_linear bfloat16 K64 N96 R16, M 200" in cuda.slower(table.LINEAR, *forward)
    measured = {FORWARD: {"200": row()}, BACKWARD: {"200": row(us=2.0)}}
    write(table.user_file(), proof(PLAN), measured)
    assert cuda.slower(table.LINEAR, *forward) is None
    assert "measured here: 2 us, plain torch 2 us" in cuda.slower(table.BACKWARD, *backward, needs=table.ALL)
    measured[BACKWARD]["200"] = row()
    write(table.user_file(), proof(PLAN), measured)
    assert cuda.slower(table.BACKWARD, *backward, needs=table.ALL) is None
    # fewer gradients are another entry
    first = [False, False, False, True, True]
    assert "not been measured" in cuda.slower(table.BACKWARD, *backward, needs=first)
    assert cuda.slower("another", *forward) == "it has not been measured"
    measured[FORWARD]["200"]["triton"] = {"us": 0.5, "plan": {"way": "single_pass"}}
    write(table.user_file(), proof(PLAN), measured)
    assert cuda.slower(table.LINEAR, *forward) is None  # triton is not proven here


@pytest.fixture
def mixed(monkeypatch):
    """(A, B, rows of each, needs) -> what is selected of the kernels of GPUs, for K 16, N 32, R 4"""
    module, reason = dispatch.load("triton")
    if module is None or not module.INTERPRETED:
        pytest.skip(reason or "for the interpreter")
    monkeypatch.setattr(dispatch, "candidates", lambda device: [cuda, module])
    proven = {plan: {"float16": 8} for plan in (*module.WAYS, "group_update", "merge_", table.MIXED)}
    table.save(name(), {"triton": table.conditions("triton", CPU) | {"dropped": {}, "plans": proven}})

    def selected(A, B, T, needs=None):
        x, weight, bias, _, _, dy, p = (t.half() for t in make(B * T, 32, 16, 4))
        factors, ids = (x.new_zeros(A, 16, 4), x.new_zeros(A, 4, 32)), torch.zeros(B, dtype=torch.int64)
        given = (dy, x, weight, *factors, p, ids) if needs else (x, weight, bias, *factors, ids)
        op = table.MIXED + "_backward" * bool(needs)
        return dispatch.select(op, None, *given, needs=needs).__name__.rpartition(".")[2]

    return selected


def test_a_mixed_batch_goes_by_those_with_no_more_and_no_less_adapters_samples_and_rows(mixed):
    rows = {(2, 4, 16): (1, 1), (8, 32, 16): (1, 1), (2, 64, 16): (2, 1), (1, 2, 3): (1, 4), (1, 3, 3): (1.9, 3)}
    for (A, B, T), (us, host) in rows.items():
        timed = {"torch": 2, "torch_host": 3, "triton": {"us": us, "host": host, "plan": {"op": table.MIXED}}}
        entry = table.key(table.MIXED, torch.float16, 16, 32, 4, None, A, B)
        table.save(name(), measured={entry: {f"{B * T}": timed}})
    assert all(mixed(*size) == "triton" for size in ((2, 4, 16), (8, 32, 16), (4, 8, 16), (3, 32, 16), (1, 3, 3)))
    # between a gain and a loss, outside, a loss, and where one call takes the host longer
    for size in ((2, 33, 16), (2, 32, 16), (9, 32, 16), (8, 33, 16), (2, 4, 17), (2, 64, 16), (1, 2, 3), (2, 0, 16)):
        assert mixed(*size) == "reference", size


@pytest.mark.parametrize("speed", ["fast", "slow"])
def test_mixed_batches_are_timed_beside_plain_torch_and_chosen_where_they_gain(mixed, speed, monkeypatch):
    kept = {}

    def planted(op, *given):
        key = op, *(t.data_ptr() for t in given if isinstance(t, torch.Tensor))
        if speed == "slow" or key not in kept:
            time.sleep(0.003)
            kept[key] = getattr(reference, op)(*given), given  # held, or others would get their addresses
        return kept[key][0]

    class Here:  # runs a child's jobs in this process
        __init__ = stop = lambda *_: None
        run = lambda self, job, on_event, *_: [on_event(e) for e in worker.events(job) if "at" not in e] and None

    monkeypatch.setattr(children, "Child", Here)
    for op in (table.MIXED, f"{table.MIXED}_backward"):
        monkeypatch.setattr(plans.module("triton"), op, functools.partial(planted, op))
    report = tune([(64, 16, 32, 4, 2, 4)], [torch.float16], backends=["triton"], device="cpu", simulated=True)
    assert len(report.timed) == 3 and not report.left and not any(report.dropped.values())
    for needs in (None, table.ALL, run.FIRST_LAYER):
        assert mixed(2, 4, 16, needs) == ("triton" if speed == "fast" else "reference")
        assert mixed(3, 4, 16, needs) == mixed(2, 5, 16, needs) == "reference"


def test_a_record_of_a_mixed_batch_has_rows_for_every_sample():
    row = {"torch": 1.0, "triton": {"us": 1.0, "plan": {}}}
    with pytest.raises(ValueError, match="A2 B4 M 3: a mixed batch has at least one row for each sample"):
        table._checked({"GPU": {"proof": {}, "measured": {"mixed_linear bfloat16 K8 N8 R16 A2 B4": {"3": row}}}})


def test_the_command_asks_for_mixed_batches_of_models(monkeypatch):
    def asked(*more):
        found = []
        monkeypatch.setattr(run, "tune", lambda shapes, *_, **options: found.extend(shapes) or run.Report(*[{}] * 5))
        command.main(["--model", "vit_b", "--batch", "1", "64", *more])
        return {(M, *rest[3:]) for M, *rest in found if len(rest) > 3}

    assert asked("--device", "cuda") == {(64 * 197, 8, 64), (64 * 197, 64, 64)}
    assert asked("--device", "cuda", "--adapters", "2") == {(197, 2, 1), (64 * 197, 2, 64)}
    assert not asked("--device", "cuda", "--adapters") | asked("--device", "cpu") | asked("--backend", "cuda")
    for bad in (["--device", "cpu"], ["--device", "cuda", "--backend", "cuda"]):
        refuses(SystemExit, "2", asked, *bad, "--adapters", "2")


def test_entries_of_the_other_ops():
    sigma, v = torch.zeros(12, 4, 5), torch.zeros(5, 7)
    for op, given in (("group_update", (sigma, v)), ("group_update_backward", (sigma, sigma, v))):
        assert table._entries(op, given, None) == [(f"{op} float32 P4 Q5 N7", 12)]
    one, two = torch.zeros(8, 4), torch.zeros(6, 4)
    downs, ups = [torch.zeros(4, 3)] * 3, [torch.zeros(3, 8), torch.zeros(3, 6), torch.zeros(3, 8)]
    found = table._entries("merge_", (one, two, one, *downs, *ups), None)
    assert found == [("merge_ float32 K4 N8 R16", 2), ("merge_ float32 K4 N6 R16", 1)]


def planted(**faults) -> list[str]:
    named = {name.replace("_", " ").replace("single ", "single_"): fault for name, fault in faults.items()}
    return [sys.executable, str(WORKER), json.dumps(named)]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setitem(run.STEP_LIMIT, "cuda", 8.0)
    found = (True, False, 64), (False, False, 64), (False, False, 128), (False, True, 128), (False, True, 192)
    monkeypatch.setattr(cuda, "plans", lambda arch, R: [cuda.KernelPlan(*plan) for plan in found])


@pytest.mark.slow
def test_wrong_and_hanging_plans_are_dropped_and_named_and_the_rest_is_chosen(quick):
    worker = planted(
        single_pass_tile64="wrong", tile64="hang", tile128="die", hopper_tile128="unequal", hopper_tile192="fast"
    )
    said = []
    report = tune([(160, 64, 96, 5)], backends=["cuda"], device="cpu", simulated=True, worker=worker, say=said.append)
    dropped = report.dropped["cuda"]
    assert set(dropped) == {"single_pass tile64", "tile64", "tile128", "hopper tile128"}
    assert "is off by" in dropped["single_pass tile64"] and "no answer for 8 s" in dropped["tile64"]
    assert "SIGABRT" in dropped["tile128"] and "two runs differ" in dropped["hopper tile128"]
    assert all(any(name in line and "dropped" in line for line in said) for name in dropped)
    assert report.proven["cuda"].keys() == {"hopper tile192", "group_update", "merge_"} and not report.left
    # what is chosen changes in this process
    entry = table.key(table.LINEAR, torch.bfloat16, 64, 96, 5)
    assert table.choice(CPU, entry, 160).backend == "cuda"
    x, weight, bias, down, up, dy, p = make(160, 96, 64, 5)
    assert cuda.slower(table.LINEAR, x, weight, bias, down, up) is None
    assert cuda._plan(table.LINEAR, x, weight, 5) == cuda.KernelPlan(False, True, 192)
    # what is on record is not proven again
    said.clear()
    again = tune([(80, 64, 96, 5)], backends=["cuda"], device="cpu", simulated=True, worker=worker, say=said.append)
    assert again.dropped["cuda"] == dropped and not any("is right in" in line for line in said)


@pytest.mark.slow
def test_a_plan_that_hangs_while_it_is_timed_is_dropped_too(quick, monkeypatch):
    linear = [plan._asdict() for plan in cuda.plans("", 5)]
    write(table.user_file(), proof(*linear, {"op": "merge_"}, {"op": "group_update"}), {})
    monkeypatch.setitem(run.STEP_LIMIT, "cuda", 3.0)
    worker = planted(tile64="hang", hopper_tile192="fast", single_pass_tile64="slow", tile128="slow")
    report = tune([(160, 64, 96, 5)], backends=["cuda"], device="cpu", simulated=True, worker=worker)
    assert set(report.dropped["cuda"]) == {"tile64"} and "tile64" not in report.proven["cuda"]
    assert report.timed[0].choice.plans["cuda"]["tile"] == 192


def test_a_child_that_cannot_start_proves_nothing(quick):
    worker = [sys.executable, "-c", "raise SystemExit('no memory')"]
    report = tune([(8, 8, 8, 8)], backends=["cuda"], device="cpu", simulated=True, worker=worker)
    assert report.proven["cuda"] == report.dropped["cuda"] == {}
    assert all("no memory" in line for line in report.left if "battery" in line) and len(report.left) >= 7


def test_when_time_is_up_nothing_new_is_started(quick):
    report = tune([(8, 8, 8, 8)], backends=["cuda"], device="cpu", simulated=True, worker=planted(), minutes=1e-4)
    assert not report.timed and len(report.left) >= 7


@pytest.mark.slow
def test_a_cpu_is_tuned_by_instruction_set(monkeypatch):
    """each against plain torch; what is measured goes before the rules, and deleting the file brings them back"""
    from efft_kernels.kernels import cpu

    if cpu.unavailable():
        pytest.skip(cpu.unavailable())
    monkeypatch.setattr(prove, "SHAPES", prove.SHAPES[:1])
    before, said = cpu.isa(), []
    code = "import torch; torch.set_num_threads(1); from efft_kernels.kernels.tuning import worker; worker.main()"
    worker = [sys.executable, "-c", code]
    report = tune([(24, 40, 48, 5)], [torch.float32], device="cpu", simulated=True, worker=worker, say=said.append)
    assert report.proven["cpu"].keys() == {f"{isa}" for isa in cpu.isas()} and not report.dropped["cpu"]
    assert len(report.timed) == 3 and any("instruction set" in line for line in said)
    (plan,) = {json.dumps(each.choice.plans["cpu"]) for each in report.timed}
    assert table.recorded_isa() == json.loads(plan)["isa"]
    given = [torch.zeros(size) for size in ((24, 40), (48, 40), (48,), (40, 5), (5, 48))]
    monkeypatch.setattr(cpu_rules, "of", lambda isa: "a rule")
    chosen = report.timed[0].choice.backend
    try:
        cpu.set_isa(table.recorded_isa())
        reason = cpu.slower(table.LINEAR, *given)
        assert reason is None if chosen == "cpu" else "measured here" in reason
        table.user_file().unlink()
        table.invalidate()
        assert cpu.slower(table.LINEAR, *given) == "a rule"
    finally:
        cpu.set_isa(before)


def test_an_unproven_gpu_is_told_of_the_command_once(monkeypatch, caplog):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(table, "gpu", lambda index: ("Some GPU", "sm_90"))
    for module in (cuda, plans.module("triton")):
        monkeypatch.setattr(module, "unavailable", lambda: None)
        monkeypatch.setattr(module, "unproven", lambda device: "of a planted reason")
    dispatch._advise.cache_clear()
    with caplog.at_level("WARNING", "efft_kernels"):
        assert [dispatch.candidates(device), table.invalidate(), dispatch.candidates(device)] == [[], None, []]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "Some GPU" in line and table.COMMAND in line
    # with a record it is chosen in the same process
    monkeypatch.setattr(cuda, "unproven", lambda device: None)
    table.invalidate()
    assert dispatch.candidates(device) == [cuda]


def test_bad_arguments():
    size = (1, 2, 3, 4)
    for bad, got in ((["reference"], "'reference'"), ("cpu", "'cpu'"), ([], r"\[\]"), (iter(["cpu", 1]), "1")):
        refuses(ValueError, f"backends must be a list of .*'cpu'.*, got {got}", tune, [size], backends=bad)
    for bad in ("float32", torch.float32, ["float32"], [torch.int8], [torch.complex64], []):
        refuses(ValueError, "dtypes must be a list of .*torch.float32.*, got", tune, [size], bad)
    for bad in (1, (1, 2, 3), (True, 2, 3, 4), (1, 2, 3, 0), (1, 2, 3, 1.5), (*size, 2), (64, 16, 32, 4, 2, 3)):
        refuses(ValueError, "positive integers, M a multiple of B, got", tune, [(8, 8, 8, 8), bad])
    for bad in ("meta", "xpu", f"cuda:{torch.cuda.device_count()}"):
        refuses(ValueError, f"device must be cpu or one of .* CUDA devices, got {bad}", tune, [size], device=bad)
    refuses(ValueError, "minutes must be a positive number, got 0", tune, [(8, 8, 8, 8)], minutes=0)


@pytest.mark.slow
def test_the_command(quick, monkeypatch, capsys):
    monkeypatch.setattr(children, "WORKER", planted(hopper_tile192="fast"))
    monkeypatch.setattr(run, "tune", functools.partial(run.tune, simulated=True))
    assert command.main(["--shapes", "160,64,96,5", "--backend", "cuda", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "hopper tile192 is right in" in out and "chosen: cuda" in out and str(table.user_file()) in out
    for bad in ("--shapes 1,2,3", "--batch 0", "--dtype int8", "--shapes 1,2,3,4 --adapters 2"):
        refuses(SystemExit, "2", command.main, bad.split())
    assert command.main(["--model", "no_such_model"]) == 1 and "no_such_model" in capsys.readouterr().err
    given = "--shapes", "80,64,96,5", "--backend", "cuda", "--device", "cpu"
    assert command.main([*given, "--minutes", "1e-6"]) == 1
    out, err = capsys.readouterr()
    assert "nothing was timed" in err and "on record" not in out


def test_sizes_of_models():
    M = 2 * 197
    sizes = (768, 2304), (768, 768), (768, 3072), (3072, 768)
    assert shapes.model_shapes("vit_b", 2, 8) == [(M, *size, 8) for size in sizes]
    assert len(set(shapes.model_shapes("swin_t", 64, 16))) == 16
    pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    refuses(ValueError, "must have Linears before its head, got 'resnet18'", shapes.model_shapes, "resnet18", 2, 8)
    assert shapes.model_shapes("vit_base_patch16_224", 2, 8) == shapes.model_shapes("vit_b", 2, 8)
    assert set(shapes.model_shapes("swin_tiny_patch4_window7_224", 1, 4)) >= set(shapes.model_shapes("swin_t", 1, 4))


def test_a_backend_without_kernels_for_the_dtypes_is_neither_proven_nor_dropped():
    plan = {"op": "merge_"}
    job = {"task": "prove", "device": "cpu", "backend": "cpu", "plans": [plan], "dtypes": ["complex64"], "threads": 1}
    assert list(worker.events(job | {"simulated": True})) == [{"plan": plan, "cases": 0}]
    said, recorded = [], []
    tuner = run._Tuner(torch.device("cpu"), [torch.float32], 0.0, ["true"], True, said.append, lambda event: None)
    tuner.record = lambda *proven: recorded.append(proven)
    for name in ("merge_", "group_update"):
        tuner._right("triton", name, 0, "float32")
    assert not said and not recorded and len(tuner.left) == 1 and "no kernels for float32" in tuner.left[0]
    tuner._right("triton", "group_update", 4, "float16")
    assert recorded == [("triton", {"group_update": {"float16 short": 4}}, {})] and len(tuner.left) == 1


class Fast:
    """In the place of a child: all is right, and one instruction set fast"""

    jobs: list[dict] = []
    fast = "one"
    __init__ = stop = lambda *_: None

    def run(self, job, on_event, *_):
        self.jobs.append(job)
        if job["task"] == "prove":
            return [on_event({"plan": plan, "cases": 1}) for plan in job["plans"]] and None
        us = {f"cpu: {plan['isa']}": 50.0 if plan["isa"] == self.fast else 200.0 for _, plan in job["candidates"]}
        entry = table.key(job["op"], getattr(torch, job["dtypes"][0]), *job["shape"][1:], job["needs"])
        timed = {"torch": 100.0, "cpu": {"us": 50.0, "plan": {"isa": self.fast}}}
        return on_event({"row": timed, "entry": entry, "M": job["shape"][0], "us": us | {"product first": 100.0}})


@pytest.fixture
def isas(monkeypatch):
    """a CPU with two of them"""
    cpu = plans.module("cpu")
    monkeypatch.setattr(cpu, "unavailable", lambda: None)
    monkeypatch.setattr(cpu, "isas", lambda: ["one", "two"])
    monkeypatch.setattr(children, "Child", Fast)
    monkeypatch.setattr(Fast, "jobs", [])
    return functools.partial(tune, device="cpu", simulated=True)


def test_an_instruction_set_gains_nothing_by_a_disturbed_turn(monkeypatch):
    made = {"cpu: a": ("cpu", {"isa": "a"}), "cpu: b": ("cpu", {"isa": "b"})}
    monkeypatch.setattr(plans, "active", lambda *given: contextlib.nullcontext())
    for turns, want in (
        (((100, 80), (30000, 400), (110, 440)), (100, 80, 400)),  # b again
        (((100, 80), *((30000, 400),) * 3), (100, 80, 320)),  # in vain
        (((100, 80), (120, 480)), (100, 80, 400)),  # a processor's clock
    ):
        left = iter([dict(zip(("product first", "last"), map(float, turn))) for turn in turns])
        monkeypatch.setattr(timing, "interleaved", lambda v, *_: dict(zip(v, next(left).values())))
        us = timing._by_isa(dict.fromkeys(["product first", *made]), made, [], CPU, 1.0)
        assert tuple(us.values()) == want and next(left, None) is None


def test_a_cpu_battery_that_runs_out_of_time_leaves_what_is_proven(isas, monkeypatch, capsys):
    done, late = Fast.run, children.Death({}, children.LATE, True)
    cut = lambda self, job, *rest: late if {"isa": "two"} in job.get("plans", []) else done(self, job, *rest)
    monkeypatch.setattr(Fast, "run", cut)
    monkeypatch.setattr(run, "tune", functools.partial(run.tune, simulated=True))
    assert command.main("--shapes 8,16,16,4 --dtype float32 --device cpu".split()) == 0
    out = capsys.readouterr().out
    assert "not done: the battery of cpu: two in float32: no time was left" in out and "more --minutes" in out
    assert [*table.proof("cpu", CPU)["plans"]] == ["one"]


def test_of_two_runs_on_a_cpu_the_instruction_set_of_the_later_one_counts_alone(isas, monkeypatch):
    said, entry = [], table.key(table.LINEAR, torch.float32, 64, 64, 16)
    for fast, K in (("one", 64), ("two", 128)):
        monkeypatch.setattr(Fast, "fast", fast)
        report = isas([(197, K, K, 16)], [torch.float32], say=said.append)
        assert table.recorded_isa() == fast and report.timed[0].choice.backend == "cpu"
        assert (table.choice(CPU, entry, 197) is None) is (fast == "two")
    assert "measured with one counts no more" in said[-1]
    assert {job["threads"] for job in Fast.jobs} == {torch.get_num_threads()}


def test_a_run_on_a_cpu_that_is_killed_leaves_what_was_chosen_before(isas, monkeypatch):
    entry = table.key(table.LINEAR, torch.float32, 64, 64, 16)
    isas([(197, 64, 64, 16)], [torch.float32])
    monkeypatch.setattr(Fast, "fast", "two")

    def note(event):
        if "entry" in event:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        isas([(197, 64, 64, 16)], [torch.float32], note=note)
    table.invalidate()
    assert table.choice(CPU, entry, 197).backend == "cpu"


def test_each_dtype_is_proven_and_a_short_battery_is_not_a_whole_one(isas, monkeypatch):
    monkeypatch.setattr(plans.module("cpu"), "set_isa", lambda isa: None)
    proven = lambda: [(*job["dtypes"], job["simulated"]) for job in Fast.jobs if job["task"] == "prove"]
    isas([(8, 16, 16, 4)], [torch.float32])
    isas([(8, 16, 16, 4)], [torch.float32, torch.bfloat16])
    assert proven() == [("float32", True)] * 2 + [("bfloat16", True)] * 2
    isas([(8, 16, 16, 4)], [torch.float32], simulated=False)
    isas([(8, 16, 16, 4)], [torch.float32])
    assert proven()[4:] == [("float32", False)] * 2
