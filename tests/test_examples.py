"""examples/: each script runs as its first lines say, on its default small model."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import timm
from safetensors.torch import load_file

timm()
ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script in this process, which has imported what takes most of the time, and returns what it printed."""

    def run(name: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_finetune_timm(run, tmp_path):
    printed = run("finetune_timm.py")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < 0.5 * losses[0] and float(printed.split()[-1]) < 1e-4
    head = {name: t for name, t in load_file(tmp_path / "stripes.safetensors").items() if name.startswith("head/")}
    assert head["head/head.weight"].shape[0] == 2


@pytest.mark.slow
def test_peft_trainer(run, tmp_path):
    pytest.importorskip("peft")
    printed = run("peft_trainer.py")
    assert "trainable params" in printed and float(printed.split()[-1]) >= 0.9
    assert (tmp_path / "peft_example" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_many_adapters(run):
    printed = run("many_adapters.py")
    assert "refused: " in printed and "[200, 10, 196, 200]" in printed


def test_all_examples_are_tested_and_short():
    assert [path.stem for path in EXAMPLES] == ["finetune_timm", "many_adapters", "peft_trainer"]
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 60 and f"python examples/{path.name}" in path.read_text()


@pytest.mark.slow
def test_photos_to_page(tmp_path, monkeypatch, caplog):
    for package in ("accelerate", "torchmetrics", "jsonargparse", "tensorboard", "jinja2", "matplotlib", "ray"):
        pytest.importorskip(package)
    from test_finetune_data import folder

    from efft_kernels.finetune import cli

    photos = folder(tmp_path / "photos", n=8)
    torch.save(timm().create_model("test_vit", num_classes=0).state_dict(), tmp_path / "w.pt")
    *commands, serve = (ROOT / "examples" / "photos_to_page.sh").read_text().splitlines()
    assert serve == 'python -m efft_kernels.serving --model "$model" --weights "$weights" --adapters "$out/adapters"'
    small = "--image_size 160 --batch_size 4 --epochs 1 --warmup_epochs 0 --device cpu --workers 0".split()
    # a command that hands its arguments to this process, which has imported what takes most of the time
    for fifo in ("call", "code"):
        os.mkfifo(tmp_path / fifo)
    (tmp_path / "efft-finetune").write_text('#!/bin/bash\nprintf "%s\\0" "$@" > call\nexit $(cat code)\n')
    (tmp_path / "efft-finetune").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    script = "\n".join(["trap ': > call' EXIT", *commands])
    bash = ["bash", "-c", script, "photos_to_page.sh", str(photos), "test_vit", "w.pt", "out", *small]
    with subprocess.Popen(bash) as running:
        try:
            while call := Path("call").read_text():
                Path("code").write_text(str(cli.main(call.split("\0")[:-1])))
        except BaseException:
            running.kill()
            raise
    assert running.returncode == 0
    out = tmp_path / "out"
    assert len((out / "labels.csv").read_text().splitlines()) > 16 and (out / "compared.html").is_file()
    assert (out / "photos" / "report.html").is_file() and (out / "lora").is_dir()

    from efft_kernels.serving.settings import Settings
    from efft_kernels.serving.start import check_model

    check_model(Settings(model="test_vit", weights=str(tmp_path / "w.pt"), adapters=str(out / "adapters")))
    assert "cannot be served" not in caplog.text
