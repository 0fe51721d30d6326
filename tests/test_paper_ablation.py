"""Ablation and subspaces: variants that fit a model, changes seed by seed, maps of trained updates."""

import pytest
from benchmark_scripts import need, refused
from models import timm, vit

timm()
need("matplotlib", "tabulate", "tqdm", "accelerate", "torchmetrics")

import ablation
import subspace
from changes import table
from record import read_run
from test_paper_vtab1k import few_images

import efft_kernels as ek


def record(method, top1, seed=0):
    return {"data": "x", "method": method, "seed": seed, "top1": top1, "parameters": 1234}


def test_every_variant_is_a_config_that_changes_one_thing():
    model = vit(depth=12)
    base = {method: ek.plan(model, ek.EFFTConfig(method, rank=16)) for method in ("efft1", "efft2")}
    families = ablation.variants(12)
    assert len(families["layers"]) == 10 and set(families) == {"layers", "init", "ranks", "cores", "scale"}
    for family, found in families.items():
        for name, settings in found.items():
            for method in ("efft1", "efft2"):
                if not ablation.fits(method, settings):
                    continue
                config = ek.EFFTConfig(method, **{"rank": 16} | settings)
                made = ek.plan(model, config)
                assert config != base[method].config, f"{method} {name}"
                if family == "layers":
                    blocks = {slot.site.block for group in made.groups for slot in group.slots}
                    assert blocks == set(settings.get("blocks", range(12)))
    assert not any("9-11" in name for name in ablation.variants(6)["layers"])
    assert not ablation.fits("efft1", {"ffn_rank": (8, 16)}) and not ablation.fits("efft1", {"zero_init": "vu"})


def test_change_is_taken_seed_by_seed():
    made = lambda top1, **settings: [record("efft2", one, seed=seed) | settings for seed, one in enumerate(top1)]
    runs = made((50.0, 60.0)) + made((52.0, 61.0), **{"settings.zero_init": "u"})
    runs += made((49.0,), **{"settings.targets": '["attn"]', "settings.blocks": "[0, 1]"})
    runs += made((None,), **{"settings.cores": "shared"}) + [record("efft1", 40.0)]
    head, lines = table(runs)
    assert head == ["variant", "parameters (M)", "EFFT2, x", "EFFT1, x"]
    assert lines == [
        ["base", "0.001", "55.0 ± 7.1", "40.0"],
        ["zero_init u", "0.001", "+1.5 ± 0.7", "–"],
        ["blocks 0, 1; targets attn", "0.001", "−1.0", "–"],
        ["cores shared", "0.001", "diverged", "–"],
    ]
    runs[-2].pop("parameters")  # as the record of a run that diverged
    assert table(runs)[1][3] == ["cores shared", "–", "diverged", "–"]
    assert table(runs[2:])[1][0] == ["zero_init u", "0.001", "–", "–"]  # all runs of the base failed
    with pytest.raises(ValueError, match=r"runs of EFFT1, x: expected .* alone, got \['epochs 1', 'epochs 2'\]"):
        table([record("efft1", 40.0) | {"settings.epochs": epochs} for epochs in (1, 2)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quick", "--data", ".", "--checkpoint", "x", "--datasets", "a"], "--quick has data of its own"),
        (["--quick", "--model", "x"], "--checkpoint and --model need --data"),
        (["--lr", "nan"], "--lr must be a positive number, got nan"),
        (["--seeds", "0"], "--seeds must be a positive number, got 0"),
    ],
)
def test_arguments_that_do_not_fit(arguments, said, capsys):
    refused(ablation.main, arguments, said, capsys)


def test_a_quick_run_takes_what_is_given_and_stays_apart(tmp_path, monkeypatch, capsys):
    args = ablation.parse(["--quick", "--rank", "2", "--lr", "0.5", "--epochs", "3", "--datasets", "a", "a"])
    assert args.out.name == "ablation_quick" and ablation.data_sets(args) == ["a"]
    settings = ablation.base(args)[0]
    assert [settings[name] for name in ("rank", "lr", "epochs", "scale")] == [2, 0.5, 3, 1.0]
    seen = []
    monkeypatch.setattr(ablation, "complete", lambda runs, *rest: (seen.extend(runs), ([], {"a": "why"}))[1])
    out = ["--quick", "--out", str(tmp_path)]
    assert ablation.main([*out, "--families", "cores", "--methods", "efft1", "--seeds", "2"]) == 1  # all runs failed
    assert [run.seed for run in seen] == [0, 1, 0, 1] and "failed: a: why" in capsys.readouterr().err
    monkeypatch.setattr(subspace, "trained", None)  # nothing is trained before the blocks are known to be there
    assert subspace.main([*out, "--blocks", "12"]) == 2 and "must be from 0 to 11" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_quick_runs_that_subspace_and_ablation_share(tmp_path, capsys, monkeypatch):
    few_images(monkeypatch)
    assert subspace.main(["--quick", "--blocks", "3", "--out", str(tmp_path)]) == 0
    found = {row["compared"]: row for row in read_run(tmp_path / "subspace.json")["results"]}
    assert len(found) == len(subspace.COMPARISONS) + 1 and (tmp_path / "subspace.png").exists()
    for row in found.values():
        assert all(0 <= row[key] <= 1.0001 for key in ("first", "quarter", "all", "mean"))
    # attention-only and joint training start from the same factors with the same seed, from others with another
    assert found["q: MHSA-only and joint, one seed"]["first"] > 0.8 > found["q: MHSA-only and joint"]["first"]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("adapter.safetensors")}
    assert len(before) == 6
    assert ablation.main(["--quick", "--methods", "efft2", "--families", "cores", "scale", "--out", str(tmp_path)]) == 0
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("adapter.safetensors")}
    assert before.items() <= after.items() and len(after) == 8  # the base was trained before
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    full = 7 * 192 * 4 + 6 * 12 * 16
    for count in (full, full + 2, 7 * 192 * 4 + 6 * 16):  # base, a scale per group, one set of cores
        assert f"| {count / 1e6:.3f} |" in text


def test_control_is_what_chance_gives():
    phi = subspace.control(300, 300, 20)
    assert phi.shape == (20, 20) and phi[19, 19].item() == pytest.approx(20 / 300, rel=0.3)
