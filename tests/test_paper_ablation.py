"""Ablation and subspaces: variants that fit a model, changes seed by seed, maps of trained updates."""

import sys
from pathlib import Path

import pytest
from models import timm, vit

timm()
for module in ("matplotlib", "tabulate", "tqdm", "accelerate", "torchmetrics"):
    pytest.importorskip(module)
sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "paper"))

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
    assert subspace.main(["--quick", "--blocks", "12", "--out", str(tmp_path)]) == 2  # no such block
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
