"""What was measured as data: the tables, what the CUDA backend makes of them, and how they are kept and shipped."""

import json

import pytest
import torch

from efft_kernels.kernels import cuda
from efft_kernels.kernels.tuning import table as tables
from efft_kernels.kernels.tuning.tune import difference, tune

GPU, SM_90 = "Some GPU", ("Some GPU", "sm_90")
SIZES = 200, 96, 64, 8  # M, N, K, R
PLAN = {"single_pass": True, "hopper": False, "tile": 128}
FORWARD = tables.key("lowrank_linear", "half", *SIZES, exact=True)
BACKWARD = tables.key("lowrank_linear_backward", "half", *SIZES, exact=True)


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    """the CUDA backend's, both files in the test's folder, on a GPU of capability 9.0"""
    monkeypatch.setenv("EFFT_CACHE", str(tmp_path / "user"))
    shipped = tmp_path / "cuda_configs.json"
    shipped.write_text(json.dumps({"format": 1, "about": "x", "gpus": {}}))
    monkeypatch.setattr(cuda.TABLE, "shipped", shipped)
    monkeypatch.setattr(cuda, "_gpu", lambda device: SM_90)
    cuda.TABLE.forget()
    yield cuda.TABLE
    monkeypatch.undo()
    cuda.TABLE.forget()


def ship(table, tuned=None, proven=None) -> None:
    gpus = {GPU: {"tuned": tuned or {}, "proven": proven or {}}}
    table.shipped.write_text(json.dumps({"format": 1, "gpus": gpus}))
    table.forget()


def entry(use=PLAN, ms=1.0, torch_ms=2.0) -> dict:
    return {"use": use, "ms": ms, "torch_ms": torch_ms}


def make(M, N, K, R):
    """x, weight, bias, down, up, dy, p"""
    sizes = (M, K), (N, K), (N,), (K, R), (R, N), (M, N), (M, R)
    return [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]


def plan(M=200, dup=False):
    _, N, K, R = SIZES
    x, weight, *_ = make(M, N, K, R)
    return cuda._plan(x, weight.t(), R, dup)


# -- the table --------------------------------------------------------------------------------------------------------


def test_key_rounds_what_varies():
    assert tables.key("p", "half", 12608, 768, 96, 5) == "p half M16384 N768 K96 R16"
    assert tables.key("p", "half", 1024, 768, 96, 17) == "p half M1024 N768 K96 R32"
    assert tables.key("p", "half", 12608, 768, 96, 5, exact=True) == "p half M12608 N768 K96 R16"


def test_the_users_own_goes_first(table):
    ship(table, {"a": {"ms": 1}, "b": {"ms": 2}})
    table.keep(GPU, {"a": {"ms": 3}})
    assert [table.tuned(GPU, name) for name in "abc"] == [{"ms": 3}, {"ms": 2}, None]
    assert table.tuned("Another", "a") is None
    assert (table.source(GPU, "a"), table.source(GPU, "b")) == (table.user(), table.shipped)


def test_what_is_tried_is_not_kept(table):
    table.keep(GPU, {"a": {"ms": 1}})
    table.use(GPU, "a", {"ms": 2})
    table.use(GPU, "b", {"ms": 2})
    table.use(GPU, "b", None)
    assert table.tuned(GPU, "a") == {"ms": 2} and table.tuned(GPU, "b") is None
    table.keep("Another", {"c": {"ms": 4}})
    gpus = json.loads(table.user().read_text())["gpus"]
    assert gpus == {GPU: {"tuned": {"a": {"ms": 1}}}, "Another": {"tuned": {"c": {"ms": 4}}}}


def test_a_write_that_fails_leaves_the_old_file(table, monkeypatch):
    table.keep(GPU, {"a": {"ms": 1}})
    before = table.user().read_text()
    with pytest.raises(TypeError), monkeypatch.context() as patch:
        patch.setattr(tables.os, "replace", lambda *paths: 1 + "")
        table.keep(GPU, {"b": {"ms": 2}})
    assert table.user().read_text() == before and [p.name for p in table.user().parent.iterdir()] == [table.user().name]


def test_shipping_adds_to_what_is_there(table):
    ship(table, {"a": {"ms": 1}, "b": {"ms": 2}}, {"tests": "old", "benchmark": "old"})
    table.ship(GPU, {"b": {"ms": 3}}, {"tests": "new"})
    table.ship("Another", {"c": {"ms": 4}}, {})
    gpus = json.loads(table.shipped.read_text())["gpus"]
    assert gpus[GPU] == {"tuned": {"a": {"ms": 1}, "b": {"ms": 3}}, "proven": {"tests": "new", "benchmark": "old"}}
    assert gpus["Another"] == {"proven": {}, "tuned": {"c": {"ms": 4}}} and table.tuned(GPU, "b") == {"ms": 3}


@pytest.mark.parametrize("name", ["triton_configs.json", "cuda_configs.json"])
def test_a_shipped_file_is_written_as_it_stands(name):
    """what a merge adds is the difference that a commit shows"""
    text = tables.Table(name).shipped.read_text()
    assert tables.lines(json.loads(text)) + "\n" == text


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 0, "gpus": {}}', '{"format": 1, "gpus": [1]}'])
def test_a_user_table_that_does_not_fit_is_ignored_with_a_warning(text, table):
    table.user().parent.mkdir()
    table.user().write_text(text)
    table.forget()
    with pytest.warns(UserWarning, match=f"{table.user()} .*it is ignored"):
        assert table.read()[1] == {}


# -- the CUDA backend -------------------------------------------------------------------------------------------------


def test_a_plan_on_record_goes_before_the_formula(table):
    formula = plan()
    assert formula == cuda.Plan(True, False, 64)
    ship(table, {FORWARD: entry(), BACKWARD: entry(PLAN | {"single_pass": False})})
    assert plan() == cuda.Plan(True, False, 128) and plan(dup=True) == cuda.Plan(False, False, 128)
    # these sizes, and no others
    assert plan(M=199) == plan(M=201) == formula
    table.keep(GPU, {FORWARD: entry(PLAN | {"tile": 64, "single_pass": False})})
    assert plan() == cuda.Plan(False, False, 64)


def test_what_a_gpu_can_run():
    assert cuda.plans("sm_80", 16) == [cuda.Plan(p, False, t) for p in (True, False) for t in (64, 128)]
    assert cuda.plans("sm_100", 65) == [cuda.Plan(False, False, t) for t in (64, 128)]
    hopper = [cuda.Plan(p, True, t) for p in (True, False) for t in (128, 192, 256)]
    assert set(cuda.plans("sm_90", 32)) == {*cuda.plans("sm_80", 32), *hopper}
    # the kernel for 9.0 has fewer registers to spare
    assert set(cuda.plans("sm_90", 33)) == {*cuda.plans("sm_80", 33), *hopper[3:]}


@pytest.mark.parametrize("single", [True, False])
def test_a_hopper_plan_goes_by_the_operands(single, table):
    ship(table, {FORWARD: entry({"single_pass": single, "hopper": True, "tile": 192})})
    _, N, K, R = SIZES
    x, weight, bias, down, up, _, _ = make(*SIZES)
    assert plan() == cuda.Plan(single, True, 192)
    assert cuda.slower("lowrank_linear", x, weight, bias, down, up) is None
    off = torch.zeros(200 * K + 1, dtype=x.dtype)[1:].view(200, K)
    apart = torch.zeros(200, K + 4, dtype=x.dtype)[:, :K]
    for other in (off, apart, torch.zeros(200, 2 * K, dtype=x.dtype)[:, ::2], x[:1].expand(200, K)):
        for given, w in ((other, weight), (x, other[:N])):
            assert not cuda._plan(given, w.t(), R).hopper
            assert "not been measured" in cuda.slower("lowrank_linear", given, w, bias, down, up)
    # a weight the other way round: p is not formed beside y then
    assert cuda._plan(x, weight.t().contiguous(), R).hopper is not single


def test_other_layouts_than_the_tuned_are_not_measured(table):
    """one number at a time where the record is of eight"""
    x, weight, bias, down, up, _, _ = make(*SIZES)
    ship(table, {FORWARD: entry(), tables.key("lowrank_linear", "half", 200, 96, 60, 8, exact=True): entry()})
    ask = lambda x, weight: cuda.slower("lowrank_linear", x, weight, bias, down, up)
    assert ask(x, weight) is None
    wider = torch.zeros(200, 72, dtype=x.dtype)
    assert ask(wider[:, :64], weight) is None and "16 bytes" in ask(wider[:, 1:65], weight)
    assert "16 bytes" in ask(x, wider[:96, 1:65]) and "16 bytes" in ask(x, weight.t().contiguous().t())
    short = x[:, :60].contiguous(), weight[:, :60].contiguous()
    assert ask(*short) is None and "16 bytes" in ask(x[:, :60], short[1])


@pytest.mark.parametrize(
    "found",
    [
        entry(PLAN | {"tile": 96}),
        entry(PLAN | {"hopper": True, "tile": 64}),
        entry(PLAN | {"stages": 4}),
        entry({"single_pass": True}),
        entry(None),
        entry(ms="fast"),
        {"use": PLAN},
        "quick",
    ],
    ids=str,
)
def test_a_plan_that_cannot_run_is_an_error_that_names_the_file(found, table):
    ship(table, {FORWARD: found})
    for ask in (plan, lambda: cuda.slower("lowrank_linear", *make(*SIZES)[:5])):
        with pytest.raises(ValueError, match=f"{table.shipped}: '{FORWARD}' of Some GPU must have .*'tile': 256"):
            ask()
    table.keep(GPU, {FORWARD: found})
    with pytest.raises(ValueError, match=str(table.user())):
        plan()


def test_a_plan_of_another_chip_is_refused(table, monkeypatch):
    ship(table, {FORWARD: entry(PLAN | {"hopper": True})})
    monkeypatch.setattr(cuda, "_gpu", lambda device: (GPU, "sm_80"))
    with pytest.raises(ValueError, match="must have"):
        plan()
    wide = tables.key("lowrank_linear", "half", 200, 96, 100, 65, exact=True)
    ship(table, {wide: entry()})
    x, w = (torch.zeros(size, dtype=torch.bfloat16) for size in ((200, 100), (100, 96)))
    with pytest.raises(ValueError, match="must have"):  # no registers for 65 ranks beside y
        cuda._plan(x, w, 65)


def test_every_plan_that_is_shipped_can_run():
    table = tables.Table("cuda_configs.json")
    for gpu, found in json.loads(table.shipped.read_text())["gpus"].items():
        for name, tuned in found["tuned"].items():
            rank = int(name.rpartition(" R")[2])
            assert cuda.Plan(**tuned["use"]) in cuda.plans("sm_90", rank), (gpu, name)
            assert tuned["ms"] > 0 and tuned["torch_ms"] > 0


def test_slower_unless_on_record_as_faster(table):
    x, weight, bias, down, up, dy, p = make(*SIZES)
    forward = x, weight, bias, down, up
    # dx [M, K] = dy [M, N] @ weight: sizes as in SIZES for a weight [K, N]
    turned = x.new_zeros(SIZES[2], SIZES[1])
    backward = x, dy, turned, up.t(), down.t(), p
    ask = cuda.slower
    assert ask("lowrank_linear", *forward) == ask("lowrank_linear_backward", *backward) == "it has not been measured"
    ship(table, {FORWARD: entry()})
    assert ask("lowrank_linear", *forward) is None
    assert ask("lowrank_linear_backward", *backward) == "it has not been measured"
    assert ask("lowrank_linear", x[:100], *forward[1:]) == "it has not been measured"
    ship(table, {FORWARD: entry(ms=2.0), BACKWARD: entry()})
    assert ask("lowrank_linear", *forward) == "measured here: 2.0 ms, torch 2.0 ms"
    assert ask("lowrank_linear_backward", *backward) is None
    # fewer gradients are another op, which was not measured
    assert ask("lowrank_linear_backward", x, None, *backward[2:]) == "it has not been measured"
    assert ask("lowrank_linear_backward", *backward[:5], None) == "it has not been measured"
    for op in ("group_update", "group_update_backward", "lowrank_add", "merge_", "mixed_linear"):
        assert ask(op, *forward) == "it has not been measured"


def test_never_by_itself_without_a_record(table, monkeypatch):
    not_run = "not yet run on a GPU: its tests have passed in a simulator only, and nothing is measured"
    ship(table, {FORWARD: entry()})  # times prove nothing
    # and what a user's own table says of itself neither
    own = {"proven": {"tests": "a", "benchmark": "b"}, "tuned": {FORWARD: entry()}}
    table.user().parent.mkdir()
    table.user().write_text(json.dumps({"format": 1, "gpus": {GPU: own}}))
    table.forget()
    assert cuda.unproven() == not_run
    monkeypatch.setattr(cuda, "_load", lambda: (None, "it is not built"))
    assert cuda.unavailable() == "it is not built (not yet run on a GPU)"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name, proven, reason in (
        (GPU, {"tests": "a"}, f"no benchmark that shows it faster of the cuda kernels on an {GPU} is on record"),
        ("Another", {"tests": "a", "benchmark": "b"}, "no run of the tests of the cuda kernels on an Another"),
        (GPU, {"tests": "a", "benchmark": "b"}, None),
    ):
        ship(table, proven=proven)
        monkeypatch.setattr(cuda, "gpu", lambda index, name=name: (name, "sm_90"))
        found = cuda.unproven()
        assert found is None if reason is None else found.startswith(reason)
    assert cuda.unavailable() == "it is not built"


# -- the tuner --------------------------------------------------------------------------------------------------------


def test_bad_arguments():
    with pytest.raises(ValueError, match="backend must be one of .*got 'cpu'"):
        tune([(1, 2, 3, 4)], backend="cpu")
    for shape in ((1, 2, 3), (1, 2, 3, 0), (1, 2, 3, 1.5)):
        with pytest.raises(ValueError, match="positive integers, got"):
            tune([(8, 8, 8, 8), shape], backend="cuda")


def test_one_wrong_tile_of_a_thousand_is_seen():
    right = torch.randn(2048, 2048).bfloat16()
    assert difference(right, right) is None
    assert difference((right.float() * (1 + 1e-3)).bfloat16(), right) is None
    wrong = right.clone()
    wrong[64:128, :64] = 0
    assert (wrong - right).norm() < 4 * torch.finfo(torch.bfloat16).eps * right.norm()  # lost in the norm
    assert "largest error" in difference((wrong, right), (right, right))
    assert "relative error nan" in difference(right.where(right < 3, float("nan")), right)
    assert "[2, 2048] for" in difference(right[:2], right)
