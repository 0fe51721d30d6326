"""benchmarks/ of whole models: what is compared computes the same, and both scripts run from arguments to files."""

import functools

import pytest
import torch
import torch.nn.functional as F
from benchmark_scripts import check_files, interrupt, need, refused
from models import timm

need("matplotlib", "tabulate", "tqdm")
timm()

import bench_inference
import bench_serving
import bench_train_step
import harness
import steps
import timing
from record import read_run, spread_of

import efft_kernels as ek

VIT = ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48}, 16)
SWIN = ("swin_tiny_patch4_window7_224", dict(window_size=4, embed_dim=32, depths=(2, 1), num_heads=(2, 4)), 32)
SIZES = ["--image", "32", "--batch", "2", "--rank", "4", "--repeats", "3", "--seconds", "600"]
OPTIONS = harness.Options(rank=4, lora_rank=2)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(harness.MODELS, "vit_b", VIT)
    monkeypatch.setitem(harness.MODELS, "swin_t", SWIN)
    monkeypatch.delenv("EFFT_BACKEND", raising=False)


def backbone(model, dtype=torch.float64):
    return harness.backbone(model, 32, dtype, "cpu")


def build(name, base):
    return next(m for m in harness.methods("cpu")[0] if m.name == name).build(base, OPTIONS)


NAMES = [m.name for m in harness.methods("cpu")[0]]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "merged_onednn"])  # oneDNN has no float64
@pytest.mark.parametrize("model", ["vit_b", "swin_t"])
def test_methods_start_as_the_backbone_and_share_it(model, name):
    if name in ("peft_lora", "accelerated"):
        pytest.importorskip("peft")
    base = backbone(model)
    made, x = build(name, base), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(made.eval()(x), base.eval()(x))

    weights, head = {id(p) for p in base.parameters()}, list(base.head.parameters())
    shared = [p for p in made.parameters() if id(p) in weights]
    if name == "full":
        assert not shared and all(p.requires_grad for p in made.parameters())
    else:
        assert len(shared) == len(list(base.parameters())) - len(head) and not any(p.requires_grad for p in shared)
    assert not any(p.requires_grad for p in base.parameters())
    assert all(p.requires_grad for p in made.head.parameters())

    F.cross_entropy(made.train()(x), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)


def test_onednn_is_the_merged_step():
    base, x = backbone("vit_b", torch.float32), torch.randn(2, 3, 32, 32)
    plain, fast = build("merged", base), build("merged_onednn", base)
    fast.head.load_state_dict(plain.head.state_dict())
    inputs = []
    for model in (plain, fast):
        model.patch_embed.register_forward_hook(lambda module, args, out: inputs.append(out))
        F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-6)
    assert inputs[0].grad.norm() > 0


def same(theirs, ours, pairs):
    """Equal logits and equal gradients of pairs (parameter of theirs, what of our gradients it should be)."""
    x, labels = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1])
    ours.head.load_state_dict(theirs.head.state_dict())
    logits = []
    for model in (theirs.eval(), ours.eval()):  # no dropout
        logits.append(model(x))
        F.cross_entropy(logits[-1], labels).backward()
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-11)
    for factor, wanted in pairs():
        assert factor.grad.norm() > 0
        torch.testing.assert_close(factor.grad, wanted, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("model", ["vit_b", "swin_t"])
def test_released_efft_computes_what_ours_computes(model):
    base = backbone(model)
    theirs = build("released_efft", base)
    ours = ek.inject(harness.share(base), ek.EFFTConfig("efft2", rank=4, cores="shared", factor_dropout=0.0))
    groups = list(zip(theirs.updates, ours.efft["default"].values(), strict=True))
    with torch.no_grad():
        for group, own in groups:
            for name in ("u", "sigma", "v"):
                getattr(group, name).normal_(std=0.1)
                getattr(own, name).copy_(getattr(group, name))
    names = ("u", "sigma", "v")
    same(theirs, ours, lambda: [(getattr(g, n), getattr(own, n).grad) for g, own in groups for n in names])


@pytest.mark.parametrize("model", ["vit_b", "swin_t"])
def test_fact_computes_what_ours_computes(model):
    base = backbone(model)
    theirs = build("fact_tt", base)
    ours = ek.inject(harness.share(base), ek.FacTConfig("tt", rank=4, activation_dropout=0.0))
    groups = list(zip(theirs.updates, ours.efft["default"].values(), strict=True))
    linears = {m.slot.site.path: m for m in theirs.modules() if isinstance(m, harness.FacTLinear)}
    pairs = []
    with torch.no_grad():
        for shared, own in groups:
            for name in ("u", "v"):
                getattr(own, name).copy_(shared[name].normal_(std=0.2))
                pairs.append((shared[name], lambda own=own, name=name: getattr(own, name).grad))
            for path, slot in own.slots.items():
                cores = list(slot.cores)
                per = len(cores) // len(linears[path].sigma)
                for i, sigma in enumerate(linears[path].sigma):
                    which = cores[i * per : (i + 1) * per]
                    sigma.normal_(std=0.2)
                    own.sigma[which] = torch.stack(sigma.chunk(per, 0 if slot.transposed else 1))
                    dim = 0 if slot.transposed else 1
                    pairs.append((sigma, lambda own=own, w=which, d=dim: torch.cat(list(own.sigma.grad[w]), d)))
    same(theirs, ours, lambda: [(factor, wanted()) for factor, wanted in pairs])


def test_released_efft_draws_once_per_call(monkeypatch):
    made, drawn = build("released_efft", backbone("vit_b")), []
    form = harness.DenseUpdates._form
    counted = lambda self, slots: drawn.append(len(slots)) or form(self, slots)
    monkeypatch.setattr(harness.DenseUpdates, "_form", counted)
    made(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert drawn == [2, 1, 1] * 2  # qkv with proj, fc1, fc2; two blocks
    assert not any(group.formed for group in made.updates)


def test_ops_and_saved_bytes():
    w, x = torch.nn.Parameter(torch.ones(50, 50)), torch.ones(40, 50)
    calls = (lambda _: (x @ w.t()).relu().view(-1)), (lambda y: y.sum().backward())
    saved = steps.Saved(torch.nn.Linear(1, 1))
    with saved:
        assert steps.count_ops(calls) == [2, 4]  # mm, relu; sum, ones_like, threshold, mm
    assert saved.bytes == 4 * (40 * 50 + 40 * 50)  # x, relu


COMMON = {"model", "batch", "image", "dtype", "method", "rounds", "ms", "q1", "q3", "cpu_ms"}
RECORD = {"benchmark", "format", "complete", "date", "arguments", "machine", "versions", "commit", "backends"}
RECORD |= {"allocator", "memory", "left_out", "results"}


def facts(row):
    """the columns of a row that are no ratios"""
    return {key for key in row if not key.startswith("ratio_")}


def test_memory_of_a_step_alone(tmp_path, capsys):
    options = ["--memory", "--autocast", "--methods", "efft2", "--out", str(tmp_path / "a")]
    assert bench_train_step.main([*SIZES, *options]) == 0 and "saved" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["train_step.csv", "train_step.json"]
    rows = {row["method"]: row for row in read_run(tmp_path / "a" / "train_step.json")["results"]}
    assert rows.keys() == {"merged", "efft2"} and all("ms" not in row for row in rows.values())
    assert {row["dtype"] for row in rows.values()} == {"float32 autocast"}
    assert all(row["saved_bytes"] > 0 and row["peak_bytes"] > 0 for row in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit_b", "swin_t"])
def test_train_step(model, tmp_path, capsys):
    pytest.importorskip("peft")
    chosen = ["full", "peft_lora", "accelerated", "released_efft", "fact_tt", "efft2", "efft2_p0"]
    dtypes = ["float32", "bfloat16"]
    if model == "swin_t":
        chosen, dtypes = [name for name in chosen if name != "fact_tt"], dtypes[:1]
    options = ["--model", model, "--methods", *chosen, "--dtype", *dtypes, "--out", str(tmp_path / "a" / "b")]
    assert bench_train_step.main([*SIZES, *options]) == 0
    shown = capsys.readouterr().out
    for text in (f"{model}, batch 2, float32, step:", "dW formed dense per call", "efft2 "):
        assert text in shown

    record = check_files(tmp_path / "a" / "b", "train_step", tmp_path)
    assert record.keys() == RECORD
    rows, passes = record["results"], {"forward", "backward", "optimizer", "forward+backward", "step"}
    assert len(rows) == len(dtypes) * len(passes) * (1 + len(chosen))
    for row in rows:
        assert facts(row) == COMMON | {"pass", "trained", "trained_without_head", "ops", "loss"} | {
            "saved_bytes", "peak_bytes", "optimizer_bytes", "kept_bytes",
        }  # fmt: skip
        assert row["rounds"] == 3 and row["loss"] > 0 and 0 < row["q1"] <= row["ms"] <= row["q3"]
        assert row["method"] != "merged" or spread_of(row, "merged") == (1, 1, 1)
    steps = {(row["dtype"], row["method"]): row for row in rows if row["pass"] == "step"}
    bare = {(row["dtype"], row["method"]): row for row in rows if row["pass"] == "forward+backward"}
    for dtype in dtypes:
        get = lambda name, dtype=dtype: bare[dtype, name]
        assert get("merged")["ops"] < get("efft2_p0")["ops"] < get("efft2")["ops"] < get("released_efft")["ops"]
        assert get("accelerated")["ops"] < get("peft_lora")["ops"]
        assert get("accelerated")["trained"] == get("peft_lora")["trained"]
        assert get("merged")["saved_bytes"] < get("efft2_p0")["saved_bytes"] < get("released_efft")["saved_bytes"]
        assert get("merged")["trained_without_head"] == 0 < get("efft2")["trained_without_head"]
        assert steps[dtype, "efft2"]["ops"] > get("efft2")["ops"]
        # AdamW: two moments per number, and a step count per tensor
        assert 0 <= get("full")["optimizer_bytes"] - 2 * get("full")["trained"] * getattr(torch, dtype).itemsize < 4096
    summary = bench_train_step.summary(rows)
    assert [(s["dtype"], s["pass"]) for s in summary] == [
        (dtype, part) for dtype in dtypes for part in ("step", "forward+backward")
    ]
    assert summary[0]["ratio"]["efft2"].keys() == {"merged", *chosen} - {"efft2", "efft2_p0", "accelerated"}


def fake_compiler(monkeypatch, backend):
    monkeypatch.setattr(steps.torch, "compile", functools.partial(torch.compile, backend=backend))


@pytest.mark.slow
def test_compiled_steps(tmp_path, capsys, monkeypatch):
    fake_compiler(monkeypatch, "aot_eager")
    chosen = ["released_efft", "efft2_p0"]
    assert bench_train_step.main([*SIZES, "--compile", "--methods", *chosen, "--out", str(tmp_path)]) == 0
    record = check_files(tmp_path, "train_step", tmp_path)
    assert not record["left_out"] and record["arguments"]["compile"]
    assert {row["method"] for row in record["results"]} == {"merged", *chosen}
    for row in record["results"]:
        assert row["ops"] is None and row["saved_bytes"] is None and row["peak_bytes"] > 0 and row["loss"] > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="it cannot compile attention's float64 gradients")
def test_a_compiled_step_computes_the_same():
    base, batches = backbone("vit_b"), [(torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1]))]
    losses = []
    for compile in (False, True):
        torch.manual_seed(0)
        step = steps.Step(build("efft2_p0", base), batches, compile=compile)
        for _ in range(3):
            timing.run(step.stages())
        losses.append(step.loss)
    torch.testing.assert_close(*losses)


@pytest.mark.slow
def test_a_method_that_cannot_be_compiled_is_left_out(capsys, monkeypatch):
    def no_efft(graph, inputs):
        if any("efft" in str(node.target) for node in graph.graph.nodes):
            raise NotImplementedError("no code for this graph")
        return graph

    fake_compiler(monkeypatch, no_efft)
    assert bench_train_step.main([*SIZES, "--compile", "--methods", "efft2_p0"]) == 0
    shown = capsys.readouterr().out
    assert "efft2_p0         left out of float32: backend='no_efft' raised: NotImplementedError: no code" in shown


@pytest.mark.slow
def test_steps_from_a_graph_are_one_pass(tmp_path, capsys, monkeypatch):
    """The rows, table and chart of --graph, with eager steps in place of replayed ones."""
    found = [m for m in harness.methods("cpu")[0] if m.name in ("merged", "efft2_p0")]
    eager = lambda step, pool, stream: [(lambda _, b=b: timing.run(step.stages(b)),) for b in range(steps.BATCHES)]
    monkeypatch.setattr(steps.Step, "capture", eager)
    adamw = torch.optim.AdamW  # refuses capturable=True on a CPU
    monkeypatch.setattr(steps.torch.optim, "AdamW", lambda *args, capturable, **more: adamw(*args, **more))
    for name in ("graph_pool_handle", "Stream"):
        monkeypatch.setattr(bench_train_step.torch.cuda, name, lambda: None)
    main = bench_train_step.measure
    captured = lambda args, record, found, *_: main(args, record, found, graph=True)
    monkeypatch.setattr(bench_train_step, "measure", captured)
    assert bench_train_step.main([*SIZES, "--methods", *(m.name for m in found), "--out", str(tmp_path)]) == 0
    record = check_files(tmp_path, "train_step", tmp_path)
    assert [(row["pass"], row["method"]) for row in record["results"]] == [("step", m.name) for m in found]
    assert all(row["ops"] > 0 and row["saved_bytes"] > 0 and row["peak_bytes"] > 0 for row in record["results"])
    assert [s["pass"] for s in bench_train_step.summary(record["results"])] == ["step"]


def test_reasons():
    assert steps.reason(RuntimeError("a\nb")) == "a"
    assert steps.reason(RuntimeError("backend='x' raised:\nTypeError: b\nc")) == "backend='x' raised: TypeError: b"


@pytest.mark.slow
def test_inference(tmp_path, capsys):
    chosen = ["merged", "released_efft", "efft2", "efft1"]
    options = ["--methods", *chosen, "--dtype", "float32", "bfloat16", "--out", str(tmp_path / "run")]
    assert bench_inference.main([*SIZES, *options]) == 0 and "set_adapter" in capsys.readouterr().out
    record = check_files(tmp_path / "run", "inference", tmp_path)
    assert record.keys() == RECORD | {"operations", "adapter_bytes"}
    rows = record["results"]
    for row in rows:
        # operations have no memory of their own
        assert facts(row) == COMMON | {"operation", "images_per_s", "ops", "peak_bytes", "kept_bytes"}
        assert (row["images_per_s"] is None) == (row["peak_bytes"] is None) == bool(row["operation"])
    assert {row["operation"] for row in rows} == {None, *record["operations"]}
    forwards = {row["method"]: row for row in rows if row["operation"] is None and row["dtype"] == "float32"}
    assert list(forwards) == ["base", *chosen]
    assert forwards["merged"]["ops"] == forwards["base"]["ops"] <= forwards["efft2"]["ops"]
    merge = next(row for row in rows if row["operation"] == "merge")
    assert merge["ratio_efft2"] < 1e3
    assert bench_inference.summary(rows)[0]["ratio"].keys() == {"merged", "efft2"}
    assert record["adapter_bytes"]["bfloat16"] < record["adapter_bytes"]["float32"]


@pytest.mark.parametrize("script", [bench_train_step, bench_inference])
def test_interrupted(script, tmp_path, capsys, monkeypatch):
    interrupt(monkeypatch, 2)
    assert script.main([*SIZES, "--lora-rank", "2", "--methods", "efft2", "--out", str(tmp_path)]) == 130
    assert "interrupted: what follows is partial" in capsys.readouterr().out
    record = read_run(next(tmp_path.glob("*.json")))
    assert record["complete"] is False and {row["rounds"] for row in record["results"]} == {2}


def test_a_killed_run_keeps_its_rounds(tmp_path, monkeypatch):
    kept, interleave = [], timing.interleave

    def kept_after(calls, lap, rounds, deadline):
        for laps in interleave(calls, lap, 5, deadline):
            yield laps
            files = tmp_path / "train_step.json"
            kept.append(read_run(files) if files.exists() else None)  # what a kill at this moment leaves

    monkeypatch.setattr(timing, "interleave", kept_after)
    monkeypatch.setattr(timing, "KEEP_EVERY", 0.0)
    assert bench_train_step.main([*SIZES, "--methods", "merged", "--out", str(tmp_path)]) == 0
    assert kept[:2] == [None, None]
    for rounds, run in enumerate(kept[2:], 3):
        assert run["complete"] is False and {row["rounds"] for row in run["results"]} == {rounds}


def test_a_method_that_cannot_run_is_left_out(tmp_path, capsys, monkeypatch):
    def missing(base, o):
        raise ImportError("no package of this name")

    found, left_out = harness.methods("cpu")
    found = [m._replace(build=missing) if m.name == "peft_lora" else m for m in found]
    monkeypatch.setattr(harness, "methods", lambda device: (found, left_out))
    assert bench_train_step.main([*SIZES, "--methods", "peft_lora", "--out", str(tmp_path)]) == 0
    assert "peft_lora        left out of float32: no package of this name" in capsys.readouterr().out
    assert read_run(tmp_path / "train_step.json")["left_out"] == {"peft_lora": {"float32": "no package of this name"}}


BAD = [
    (["--model", "resnet"], "argument --model: invalid choice: 'resnet'"),
    (["--batch", "0"], "argument --batch: expected a positive integer, got '0'"),
    (["--image", "33"], "argument --image: expected a multiple of 16 for vit_b, got 33"),
    (["--rank", "769"], "argument --rank: expected at most 768 for vit_b, got 769"),
    (["--lora-rank", "769"], "argument --lora-rank: expected at most 768 for vit_b, got 769"),
    (["--dtype", "float64"], "argument --dtype: invalid choice: 'float64'"),
    (["--seconds", "-1"], "argument --seconds: expected a positive number of seconds, got '-1'"),
    (["--methods", "efft9"], "argument --methods: invalid choice: 'efft9'"),
    (["--backend", "triton9"], "argument --backend: invalid choice: 'triton9'"),
    (["--out", f"{__file__}/x"], "argument --out: expected a folder that can be written, got"),
]


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [(script, *case) for script in (bench_train_step, bench_inference) for case in BAD]
    + [
        (bench_train_step, ["--graph"], "argument --graph: expected --device cuda, got --device cpu"),
        (bench_train_step, ["--memory", "--compile"], "argument --memory: expected neither --graph nor --compile"),
        (bench_serving, ["--adapters", "0"], "argument --adapters: expected a positive integer, got '0'"),
    ],
)
def test_bad_arguments(script, arguments, sentence, capsys):
    refused(script.main, arguments, sentence, capsys)
