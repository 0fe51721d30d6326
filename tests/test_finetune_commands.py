"""What efft-finetune does with finished runs, and the flags that a page or a file shows."""

import base64
import contextlib
import csv
import io
import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from models import timm
from refusals import refuses

timm()
for package in ("accelerate", "torchmetrics", "jsonargparse", "tensorboard", "jinja2", "matplotlib"):
    pytest.importorskip(package)
from PIL import Image
from test_finetune_data import folder, picture
from test_finetune_run import at_call, end, tiny

from efft_kernels import read_adapter
from efft_kernels.finetune import checkpoints, cli, evaluation, exporting, labelling, loop, page, predictions, prepared
from efft_kernels.finetune.finished import preparation, restore
from efft_kernels.finetune.loop import train
from efft_kernels.finetune.models import logits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on awkward names of classes."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("run")
    photos = folder(root / "photos", ("train", "val", "test"), ("a", "<b> & c"), n=8)
    train(tiny(photos, root / "out", epochs=2), progress=False)
    return root / "out"


def changed(run, out, change):
    """A copy of a run with another record."""
    record = json.loads((run / "metrics.json").read_text())
    change(record)
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("logs"))
    (out / "metrics.json").write_text(json.dumps(record))
    return str(out)


def html(path) -> str:
    """A page that loads nothing: every address in it is data."""
    text = Path(path).read_text()
    for address in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert address.startswith("data:"), address
    assert "http://" not in re.sub(r'"data:[^"]*"', "", text) and "@import" not in text and "<script" not in text
    return text


def test_a_run_ends_with_its_report(run):
    text, record = html(run / "report.html"), json.loads((run / "metrics.json").read_text())
    assert (run / "curves.png").stat().st_size > 10_000
    top1 = record["result"]["metrics"]["test"]["top1"]
    said = "Confusion matrix", "Accuracy per class", "&lt;b&gt; &amp; c", "test_vit", "torch 2.", "cpu", f"{top1:.2f} %"
    for words in (*said, f"{record['result']['parameters']:,}", "width=device-width", "Linears, "):
        assert words in text, words
    rows = predictions.from_csv(run / "predictions.csv", False)
    assert [sum(row.part == part for row in rows) for part in ("val", "test")] == [16, 16]
    test = [row for row in rows if row.part == "test"]
    assert 100 * sum(not row.wrong for row in test) / 16 == pytest.approx(top1)
    assert text.count("data:image/jpeg") == sum(row.wrong for row in test)
    for row in test:
        assert (row.error < 0.5) or row.wrong or row.probability[0] < 0.5


def test_report_again_also_without_the_images(run, tmp_path, capsys, monkeypatch):
    before = html(run / "report.html")
    assert cli.main(["report", str(run)]) == cli.DONE and html(run / "report.html") == before
    assert cli.main(["report", str(run), "--data", "typo"]) == cli.WRONG and html(run / "report.html") == before
    said = r"data must be a folder or a \.csv file( or one of [^']*)?, got 'typo'\n"  # sets of other tests
    assert re.search(said, capsys.readouterr().err)
    moved = run.parent / "moved"
    (run.parent / "photos").rename(moved)
    try:
        assert cli.main(["report", str(run), "--out", str(tmp_path / "a.html")]) == cli.DONE
        assert "no pictures" in capsys.readouterr().err and "data:image/jpeg" not in html(tmp_path / "a.html")
        flags = ["report", str(run), "--data", str(moved), "--out", str(tmp_path / "b.html")]
        assert cli.main(flags) == cli.DONE
        assert html(tmp_path / "b.html").count("data:image/jpeg") == before.count("data:image/jpeg")
        assert cli.main([*flags[:3], f"{moved}/", *flags[4:]]) == cli.DONE
        assert html(tmp_path / "b.html").count("data:image/jpeg") == before.count("data:image/jpeg")
        shutil.copytree(moved, run.parent / "photos")
        picture(next((run.parent / "photos/test/a").iterdir()), 99)
        assert cli.main(["report", str(run), "--out", str(tmp_path / "a.html")]) == cli.DONE
        said = f"the report has no pictures: {run.parent / 'photos'} has others than the run"
        assert said in capsys.readouterr().err and "data:image/jpeg" not in html(tmp_path / "a.html")
        assert cli.main([*flags[:3], str(run.parent / "photos"), *flags[4:]]) == cli.WRONG
    finally:
        shutil.rmtree(run.parent / "photos", ignore_errors=True)
        moved.rename(run.parent / "photos")
    for command in (["report", "hf-hub:a/b"], ["export", "hf-hub:a/b", "--to", "onnx"]):
        assert cli.main(command) == cli.WRONG and "out must name a file" in capsys.readouterr().err
    for command, *more in (["report"], ["predict", str(run.parent), "--out", str(tmp_path / "a.csv")]):
        assert cli.main([command, str(tmp_path), *more]) == cli.WRONG and "no finished run" in capsys.readouterr().err


def test_predict_any_number_of_images(run, tmp_path, capsys, caplog, monkeypatch):
    for i in range(5):
        picture(tmp_path / "new" / "sub" / f"{i}, x.png", i)
    picture(tmp_path / "new/thumbs/0.png")
    (tmp_path / "new/bad.jpg").write_bytes(b"bad")
    out = tmp_path / "labels.csv"
    flags = ["predict", str(run), str(tmp_path / "new"), "--out", str(out), "--batch-size", "2"]
    assert cli.main(flags) == cli.DONE
    said = capsys.readouterr()
    assert f"ignored, a folder of another program: {tmp_path}/new/thumbs" in caplog.text
    assert "1 of 6 images are left out" in said.err and "bad.jpg cannot be read" in said.err and "5 images" in said.out
    rows = list(csv.DictReader(out.open()))
    assert [Path(row["image"]).name for row in rows] == [f"{i}, x.png" for i in range(5)]
    assert {row["label"] for row in rows} <= {"a", "<b> & c"} and all(0.5 <= float(row["probability"]) for row in rows)
    assert cli.main(["predict", str(run), *[rows[0]["image"]] * 2]) == cli.DONE
    file, label, p = capsys.readouterr().out.rstrip("\n").split("\t")
    assert (file, label) == (rows[0]["image"], rows[0]["label"])
    assert abs(float(p) - float(rows[0]["probability"])) < 2e-4
    assert cli.main(["predict", str(run), str(tmp_path / "new/bad.jpg")]) == cli.WRONG
    assert cli.main(["predict", str(run), str(tmp_path / "none")]) == cli.WRONG
    assert "none does not exist" in capsys.readouterr().err
    assert cli.main(["predict", str(run), rows[0]["image"], "--batch-size", "0"]) == cli.WRONG
    assert "batch_size must be an int of at least 1, got 0" in capsys.readouterr().err
    changed(run, tmp_path / "up or down", lambda record: record.update(classes=["thumbs", "up"]))
    picture(tmp_path / "new/up/thumbs/1.png")  # of another program, while thumbs/ beside up/ is a class
    made = lambda run, files, **_: [labelling.Labelled(file, ("up",), (1.0,)) for file in files]
    monkeypatch.setattr(labelling, "label", made)
    assert cli.main(["predict", str(tmp_path / "up or down"), str(tmp_path / "new")]) == cli.DONE
    out = capsys.readouterr().out
    assert "new/thumbs/0.png" in out and "new/up" not in out


@pytest.mark.slow
def test_export_to_onnx_is_checked(run, tmp_path, monkeypatch, capsys):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "m.onnx"
    assert cli.main(["export", str(run), "--to", "onnx", "--out", str(file)]) == cli.DONE
    session = runtime.InferenceSession(str(file))
    meta = session.get_modelmeta().custom_metadata_map
    file = str(next((run.parent / "photos/test/a").iterdir()))
    image = Image.open(file).resize((32, 32), Image.Resampling.BICUBIC)
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float()
    y = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0]).softmax(1)[0]
    (found,) = labelling.label(run, [file])
    assert json.loads(meta["classes"])[int(y.argmax())] == found.classes[0]
    assert abs(float(y.max()) - found.probabilities[0]) < 1e-3
    monkeypatch.setattr(exporting, "_IN_ONE_FILE", 1000)
    apart = tmp_path / "apart/m.onnx"
    apart.parent.mkdir()
    assert cli.main(["export", str(run), "--to", "onnx", "--out", str(apart)]) == cli.DONE
    assert {path.name for path in apart.parent.iterdir()} == {"m.onnx", "m.onnx.data"}
    again = runtime.InferenceSession(str(apart)).run(None, {"pixels": pixels.numpy()})[0]
    assert np.array_equal(again, session.run(None, {"pixels": pixels.numpy()})[0])
    original, calls = exporting._FromPixels.forward, []

    def other(self, pixels):  # the first calls are traced, the last ones checked
        calls.append(1)
        y = original(self, pixels)
        return y if torch.compiler.is_exporting() else y + 0.1

    monkeypatch.setattr(exporting._FromPixels, "forward", other)
    assert cli.main(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "wrong.onnx")]) == cli.WRONG
    assert "differ by 0.1" in capsys.readouterr().err and not (tmp_path / "wrong.onnx").exists()


def test_export_to_lora_and_weights(run, tmp_path, capsys):
    assert cli.main(["export", str(run), "--to", "lora", "--out", str(tmp_path / "lora")]) == cli.DONE
    assert {path.name for path in (tmp_path / "lora").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    (tmp_path / "file").touch()
    assert cli.main(["export", str(run), "--to", "lora", "--out", str(tmp_path / "file/lora")]) == cli.WRONG
    assert "out must be a folder, but" in capsys.readouterr().err


def test_a_command_writes_over_nothing_that_it_reads(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(shutil.copytree(run, tmp_path / "out").parent)
    record = json.loads(Path("out/metrics.json").read_text())
    record["settings"] |= {"checkpoint": "w.safetensors", "data": "list.csv"}
    Path("out/metrics.json").write_text(json.dumps(record))
    Path("hf").mkdir()
    for name in "w.safetensors", "list.csv", "named.csv", "0.png", "00.png", "hf/adapter_model.safetensors":
        Path(name).touch()
    Path("link.html").symlink_to("out/metrics.json")
    before, read = {path: path.read_bytes() for path in Path().rglob("*.*")}, "must not lead to a file that is read and"
    for command, says in {
        "predict out 0.png --out 00.png": "out must end in .csv, got 00.png",
        "predict out 0.png --out list.csv": read,
        "predict out 0.png named.csv --out named.csv": read,
        "predict out 0.png --out out/predictions.csv": read,
        "export out --to weights --out new.pt": "out must end in .safetensors, got new.pt",
        "export out --to weights --out w.safetensors": read,
        "export out --to weights --out out/adapter.safetensors": read,
        "export out --to lora --out hf --checkpoint hf": read,
        "compare out --out out/adapter.safetensors": "out must end in .html, got out/adapter.safetensors",
        "report out --out link.html": "out must end in .html, got /",
        "report out --out out": "out must be a file that can be written, got out: cannot be written, it is a folder",
        "report out --out 0.png/a.html": "got 0.png/a.html: there is no folder to write a file into",
        "report out --out /dev/stdout": "got /dev/stdout: cannot be written, it is a device or an open file",
    }.items():
        assert cli.main(command.split()) == cli.WRONG and says in capsys.readouterr().err, command
        assert {path: path.read_bytes() for path in Path().rglob("*.*")} == before, command


def test_what_becomes_of_standard_output(tmp_path, capsys, monkeypatch):
    def main(file, encoding="utf-8"):
        with open(file, "w", encoding=encoding) as stream, contextlib.redirect_stdout(stream):
            return cli.main(["compare", "out"])

    monkeypatch.setitem(cli.commands._COMMANDS, "compare", lambda given: cli.commands.say("caf\udce9 \u20ac") or 0)
    for encoding, said in (("utf-8", b"caf\xe9 \xe2\x82\xac\n"), ("ascii", b"caf\xe9 \\u20ac\n")):
        assert main(tmp_path / "a", encoding) == cli.DONE and (tmp_path / "a").read_bytes() == said
    reader, writer = os.pipe()
    os.close(reader)
    refuses(SystemExit, "^0$", main, writer)
    assert not capsys.readouterr().err
    refuses(SystemExit, str(cli.STORAGE), main, "/dev/full")
    assert capsys.readouterr().err == "efft-finetune: standard output could not be written: No space left on device\n"
    monkeypatch.setitem(cli.commands._COMMANDS, "compare", Mock(side_effect=KeyboardInterrupt, __doc__=""))
    assert main(tmp_path / "a") == cli.INTERRUPTED and "command begins again\n" in capsys.readouterr().err


def test_a_run_is_a_folder(run, capsys):
    assert cli.main(["predict", str(run / "adapter.safetensors"), str(run.parent / "photos")]) == cli.WRONG
    assert "RUN must be the folder that a run left, but" in capsys.readouterr().err
    for device in ("foo", "meta", "cuda:99"):  # before the run is looked for
        assert cli.main(["predict", "nowhere", str(run.parent / "photos"), "--device", device]) == cli.WRONG
        assert "device must be one of auto, cpu" in capsys.readouterr().err
    assert prepared.find_device("cpu:0") == prepared.find_device(torch.device("cpu")) == "cpu"


def test_compare(run, tmp_path, capsys, monkeypatch):
    def other(record):
        record["settings"]["lr"], record["identity"]["contents"] = 2e-3, "another digest"
        record["result"]["metrics"]["test"]["auc"] = 1.0  # of a later version
        record.pop("run")  # as an earlier version leaves it

    names, out = ("_one", r"a$\q$"), tmp_path / "c.htm"
    later = lambda record: record["settings"].update(new=1)
    runs = [changed(run, tmp_path / name, how) for name, how in zip(names, (later, other))]
    monkeypatch.setattr(cli.commands, "say", lambda *words: print(*words) or html(out))  # the page is there before
    assert cli.main(["compare", *runs, "--out", str(out)]) == cli.DONE
    head, one, two = capsys.readouterr().out.splitlines()[:3]
    contents = json.loads((run / "metrics.json").read_text())["identity"]["contents"]
    assert re.match("run +lr +new +contents of images +top-1 accuracy ", head)
    assert one.split()[:4] == ["_one", "0.003", "1", contents[:8]] and two.split()[:3] == [names[1], "0.002", "another"]
    text = html(out)
    figures = re.findall('data:image/svg.xml;base64,([^"]*)', text)
    assert len(figures) == 2 and "contents of images" in text
    assert all(name in base64.b64decode(figure).decode() for figure in figures for name in names)
    for _ in range(2):  # also over its own page beside the images
        assert cli.main(["report", str(run), "--out", str(run.parent / "photos/a.html")]) == cli.DONE
        assert cli.main(["report", runs[1]]) == cli.DONE
    (tmp_path / names[1] / "predictions.csv").unlink()
    assert cli.main(["report", runs[1]]) == cli.DONE and "predictions.csv is missing" in html(runs[1] + "/report.html")
    methods = [{"settings": {"method": name}, "identity": {"weights": name}} for name in ("efft2", "full")]
    assert not page._digests(methods, "weights"), "other weights are frozen"
    assert page._digests([methods[0], methods[0] | {"identity": {}}], "weights") == ["efft2", ""]


ANY = "report predict compare"


@pytest.mark.parametrize(
    "change, says, commands",
    [
        (lambda r: r["settings"].pop("method"), "it lacks settings.method", ANY),
        (lambda r: r["settings"].pop("scale"), "it lacks settings.scale", ANY),
        (lambda r: r["settings"].update(new=1), "this version has no setting 'new'", "report predict"),
        (lambda r: r["settings"].update(lr="x"), "lr must be a finite number", ANY),
        (lambda r: r["result"].update(metrics={}), "none of test, val and train", ANY),
        (lambda r: r["run"].update(seconds="x"), "run.seconds must not be 'x'", ANY),
        (lambda r: r["history"][0].pop("lr"), "it lacks history.0.lr", ANY),
        (lambda r: r["classes"].pop(), "states another classes", "predict"),
        (lambda r: r.pop("identity"), "it lacks identity", "predict"),
    ],
)
def test_a_record_that_does_not_fit_is_a_sentence(change, says, commands, run, tmp_path, capsys):
    out = changed(run, tmp_path / "run", change)
    for command in commands.split():
        more = [str(run.parent / "photos")] if command == "predict" else ["--out", str(tmp_path / "a.html")]
        assert cli.main([command, out, *more]) == cli.WRONG
        said = capsys.readouterr().err
        assert said.startswith(f"efft-finetune: {out}/") and says in said and len(said.splitlines()) == 1, said
    assert not (tmp_path / "a.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_several_labels_per_image(tmp_path, capsys, monkeypatch):
    """Scores are means over the classes that some image has, and do not depend on the range of a batch's logits."""
    sets, lines = [["sea"], ["sea", "sky"], [], ["sky"]], []
    for i in range(24):
        picture(tmp_path / "images" / f"{i}.png", i)
        labels = sets[i % 4] + ["rare"] * (i == 3)
        lines.append(f"images/{i}.png,{'|'.join(labels)},{'train' if i < 16 else 'test'}\n")
    (tmp_path / "list.csv").write_text("image,labels,split\n" + "".join(lines))
    settings = tiny(tmp_path / "list.csv", tmp_path / "out", epochs=2, class_weights="balanced", label_smoothing=0.1)
    settings.interpolation = "nearest"
    result = train(settings, progress=False)
    assert set(result.metrics["test"]) == {"mean_ap", "f1", "exact", "loss"}
    assert set(result.history[0]["train"]) == {"exact", "loss"}
    file = read_adapter(result.adapter)
    assert file.multilabel and file.preparation.interpolation == "nearest"
    assert "F1 per class" in html(tmp_path / "out/report.html")
    rows = predictions.from_csv(tmp_path / "out/predictions.csv", True)
    assert [row.label for row in rows] == [tuple(sets[i % 4]) for i in range(16, 24)]
    assert 100 * sum(not row.wrong for row in rows) / 8 == pytest.approx(result.metrics["test"]["exact"])
    assert cli.main(["predict", str(tmp_path / "out"), str(tmp_path / "images")]) == cli.DONE
    assert len(capsys.readouterr().out.splitlines()) == 24
    positive = lambda model, x: logits(model, x).sigmoid()  # so that each class has a probability of at least 0.5
    monkeypatch.setattr(evaluation, "logits", positive)
    result = train(replace(settings, out=str(tmp_path / "positive"), epochs=1), progress=False)
    rows = predictions.from_csv(tmp_path / "positive/predictions.csv", True)
    assert all(row.predicted == ("rare", "sea", "sky") for row in rows)
    assert result.metrics["test"]["f1"] == pytest.approx(100 * 2 / 3, abs=1e-3)  # half of the images have each of two
    monkeypatch.setattr(labelling, "logits", positive)
    assert len(next(labelling.label(result.out, [str(tmp_path / "images/0.png")], top=1)).classes) == 3


def test_predict_names_that_are_no_utf8_by_processes_of_any_kind(run, tmp_path, capsysbinary):
    path = picture(tmp_path / "caf\udce9.png")
    assert cli.main(["predict", str(run), str(path)]) == cli.DONE
    assert b"caf\xe9.png\t" in capsysbinary.readouterr().out
    prepare = preparation(*restore(run))  # a process that is spawned gets it as bytes
    with Image.open(path) as image:
        assert torch.equal(pickle.loads(pickle.dumps(prepare))(image), prepare(image))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_averaged_weights_and_patience_resume_exactly(run, tmp_path, monkeypatch):
    photos = run.parent / "photos"
    settings = tiny(photos, tmp_path / "a", ema=0.9, select="val", patience=2, epochs=8, lr=0.0, min_lr=0.0)
    assert len(train(settings, progress=False).history) == 3  # nothing improves: one best epoch and two more
    settings = replace(settings, out=str(tmp_path / "b"), lr=1e-2, patience=None, epochs=3)
    train(settings, progress=False)
    train(replace(settings, out=str(tmp_path / "raw"), ema=None), progress=False)

    def stop(*_):
        raise KeyboardInterrupt

    at_call(loop, "one_step", 6, stop, put=monkeypatch.setattr)  # the best epoch on val is in the state of step 4
    with pytest.raises(KeyboardInterrupt):
        train(replace(settings, out=str(tmp_path / "c")), progress=False)
    monkeypatch.undo()
    train(replace(settings, out=str(tmp_path / "c")), progress=False)
    assert end(tmp_path / "b") == end(tmp_path / "c") != end(tmp_path / "raw")


@pytest.mark.usefixtures("undrawn")
def test_recomputed_activations_give_the_same_run(run, tmp_path, caplog):
    caplog.set_level("INFO")
    settings = tiny(run.parent / "photos", tmp_path / "a", epochs=1, normalize="none")
    train(settings, progress=False)
    assert caplog.text.count("computing on cpu (") == 1
    train(replace(settings, out=str(tmp_path / "b"), gradient_checkpointing=True), progress=False)
    assert end(tmp_path / "a") == end(tmp_path / "b")


@pytest.mark.filterwarnings("error")
def test_no_trackers_are_no_warning():
    prepared.make_accelerator(tiny("data", "out", trackers=()))
    loop._reset_accelerate()


def test_class_weights_are_of_all_training_images():
    part = type("Part", (), {"labels": [0, 0, 0, 1]})
    data = type("Data", (), {"train": part, "classes": (*"abcd",), "multilabel": False})
    assert prepared.weigh_classes(data).tolist() == pytest.approx([4 / 6, 2.0, 1.0, 1.0])
    part.labels, data.multilabel = [(0, 2), (0, 1, 2), (0, 2), (2,)], True  # the third is in all
    assert prepared.weigh_classes(data).tolist() == pytest.approx([1 / 3, 3.0, 1.0, 1.0])


def test_a_loss_is_the_mean_over_images_however_they_are_batched():
    y, labels, weights = torch.randn(4, 3), torch.tensor([0, 0, 1, 2]), torch.tensor([1.0, 2.0, 3.0])
    run = SimpleNamespace(class_weights=weights, settings=tiny("data", "out"), data=SimpleNamespace(multilabel=False))
    whole, *parts = (evaluation.loss_of(run, y[at], labels[at]) for at in (slice(4), slice(2), slice(2, 4)))
    torch.testing.assert_close(whole, sum(parts) / 2)
    several = (torch.rand(4, 3) > 0.5).float()
    run = SimpleNamespace(class_weights=None, settings=tiny("data", "out", label_smoothing=0.2), data=run.data)
    run.data.multilabel = True
    want = torch.nn.functional.binary_cross_entropy_with_logits(y, several * 0.8 + 0.1)
    torch.testing.assert_close(evaluation.loss_of(run, y, several), want)
    one, two = torch.tensor([[1.0, 1.0, 2.0]]).log(), torch.tensor([[-9.0, 9.0]])
    for y, labels, error in (one, torch.tensor([0]), 0.75), (two, torch.ones(1, 2), 1.0):
        assert evaluation._predictions([0], y, labels)[0].error == pytest.approx(error, abs=1e-3)


def test_averages_of_weights_follow_more_closely_at_first():
    p = torch.nn.Linear(1, 1, bias=False)
    progress = checkpoints.Progress(p, None, None, torch.zeros(3))
    torch.nn.init.zeros_(p.weight)
    progress.start_averages()
    torch.nn.init.ones_(p.weight)
    progress.update_averages(0.999)
    with progress.averaged():
        assert p.weight.item() == progress.averages[0].item() == pytest.approx(0.9)
    assert p.weight.item() == 1  # training goes on from there


@pytest.mark.filterwarnings("error")
def test_names_that_matplotlib_would_read_or_lacks(run):
    record = json.loads((run / "metrics.json").read_text())
    record["settings"]["model"] = r"local-dir:a$\q$"
    page.plots.curves(io.BytesIO(), record)
    names = ["a$10_$20", "caf\udce9", "\u732b", *(f"class {i} with a long name" for i in range(37))]
    for n in (3, 40):
        assert page.plots.confusion([[1] * n] * n, names[:n]).startswith("data:image/svg+xml")
