"""Adapters on a hub, for which a local folder stands in: huggingface_hub's own calls are replaced."""

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from models import timm
from refusals import refuses

pytest.importorskip("huggingface_hub")
import huggingface_hub
from huggingface_hub import errors

import efft_kernels as ek
from efft_kernels.finetune.exporting import export
from efft_kernels.finetune.finished import restore
from efft_kernels.serving.bank import AdapterBank
from efft_kernels.serving.folder import AdapterFolder

RESPONSE = SimpleNamespace(headers={}, request=None, status_code=404)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of repositories: hub/OWNER/NAME/FILE"""
    root = tmp_path / "hub"

    def folder(repo: str, revision: str | None = None) -> Path:
        if not (root / repo).is_dir() or revision not in (None, "main"):
            raise errors.RepositoryNotFoundError(f"404 for {repo}@{revision}\nsecond line", response=RESPONSE)
        return root / repo

    class Api:
        def create_repo(self, repo, exist_ok):
            (root / repo).mkdir(parents=True, exist_ok=exist_ok)

        def create_commit(self, repo, operations, commit_message):
            assert commit_message
            for each in operations:
                data = each.path_or_fileobj
                data = data if isinstance(data, bytes) else Path(data).read_bytes()
                (folder(repo) / each.path_in_repo).write_bytes(data)

    def hf_hub_download(repo, file, revision=None):
        if not (path := folder(repo, revision) / file).is_file():
            raise errors.EntryNotFoundError(f"404 for {file}")
        return str(path)

    def snapshot_download(repo, revision=None, allow_patterns=None):
        made = tmp_path / "snapshot"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        for path in folder(repo, revision).iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, made)
        return str(made)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


def base():
    torch.manual_seed(0)
    return timm().create_model("test_vit", num_classes=3, img_size=64).eval()


def trained():
    model = ek.inject(base(), ek.EFFTConfig(rank=4))
    with torch.no_grad():
        for p in ek.adapter_parameters(model):
            p.normal_(0, 0.05)
    return model.eval()


def test_up_with_a_card_and_down_again(hub, tmp_path):
    model, preparation = trained(), ek.Preparation((64, 64), crop_pct=0.9)
    about = {"preparation": preparation, "classes": ["cat", "`dog`|", "fish"], "metrics": {"top-1 (%)": 91.25}}
    ek.save_adapter(model, tmp_path / "pets.safetensors", hub="me/pets", **about)
    assert {path.name for path in (hub / "me/pets").iterdir()} == {"adapter.safetensors", "README.md"}
    for name in ("hf-hub:me/pets", "hf-hub:me/pets@main", "hf-hub:me/pets/adapter.safetensors"):
        again = ek.load_adapter(base(), name).eval()
        assert torch.equal(again(IMAGES), model(IMAGES))
    assert again.efft["default"].preparation == preparation

    text = (hub / "me/pets/README.md").read_text()
    found = huggingface_hub.ModelCard(text)
    assert found.data.library_name == "efft_kernels" and found.data.pipeline_tag == "image-classification"
    plan = model.efft["default"].plan
    for words in (
        *("`test_vit` (VisionTransformer)", "EFFT: `variant=efft2, rank=4", f"{plan.parameters:,}", str(preparation)),
        *("| top-1 (%) | 91.25 |", "`cat`, `'dog'/`, `fish`", 'load_adapter(model, "hf-hub:me/pets")', "head"),
    ):
        assert words in text, words
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert "timm.create_model('test_vit', pretrained=True)" in code


def test_banks_and_folders_take_names_on_the_hub(hub, tmp_path):
    model = trained()
    ek.save_adapter(model, tmp_path / "a.safetensors", hub="hf-hub:me/pets")
    bank = AdapterBank(base())
    bank.add("pets", "hf-hub:me/pets")
    folder = AdapterFolder(bank, "hf-hub:me/pets", 2**20)
    assert folder.names() == ["adapter"]
    with torch.no_grad(), folder.hold("adapter") as key, bank.use([key, "pets"]):
        torch.testing.assert_close(bank.model(IMAGES), model(IMAGES))


def test_a_run_goes_to_the_hub_and_comes_back(hub, tmp_path):
    for package in ("accelerate", "torchmetrics", "jsonargparse", "tensorboard", "jinja2", "matplotlib"):
        pytest.importorskip(package)
    from test_finetune_data import folder
    from test_finetune_run import tiny

    from efft_kernels.finetune.loop import train

    photos = folder(tmp_path / "photos", ("train", "val", "test"), ("cat", "dog"), n=8)
    result = train(tiny(photos, tmp_path / "out", epochs=1), progress=False)
    assert export(tmp_path / "out", "hub", "me/run") == "hf-hub:me/run"
    card, record = ((hub / "me/run" / name).read_text() for name in ("README.md", "metrics.json"))
    assert f"| test, top-1 (%) | {result.metrics['test']['top1']:.4g} |" in card and str(tmp_path) not in record
    assert "run" not in json.loads(record), "it has the command, with paths of this machine"
    (mine, _), (theirs, _) = restore(tmp_path / "out"), restore("hf-hub:me/run")
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values()))
    assert str(tmp_path).encode() not in (hub / "me/run/adapter.safetensors").read_bytes()
    record = json.loads((tmp_path / "out/metrics.json").read_text())
    record["settings"] |= {"model": f"hf:{photos}", "checkpoint": str(photos)}
    (tmp_path / "out/metrics.json").write_text(json.dumps(record))
    export(tmp_path / "out", "hub", "me/folder")
    settings = json.loads((hub / "me/folder/metrics.json").read_text())["settings"]
    assert (settings["model"], settings["checkpoint"]) == ("hf:photos", "photos")


def test_names_that_lead_nowhere(hub, monkeypatch):
    (hub / "me/pets").mkdir(parents=True)
    model = base()
    load, missing = functools.partial(ek.load_adapter, model), "the hub has no hf-hub:me/"
    refuses(FileNotFoundError, f"{missing}none, or not for this user: 404 for me/none@None$", load, "hf-hub:me/none")
    refuses(FileNotFoundError, f"{missing}pets@v2", load, "hf-hub:me/pets@v2")
    refuses(FileNotFoundError, "404 for b.safetensors", load, "hf-hub:me/pets/b.safetensors")
    for name in ("hf-hub:pets", "hf-hub:me/pets/../../x.safetensors"):
        refuses(ValueError, "must be 'hf-hub:OWNER/NAME'", load, name)
    unreachable = errors.LocalEntryNotFoundError("offline")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Mock(side_effect=unreachable))
    refuses(OSError, "cannot be downloaded and is not in the cache: offline", load, "hf-hub:me/pets")
    assert not hasattr(model, "efft")


def test_what_cannot_be_uploaded_is_refused_before_anything_is_written(hub, tmp_path):
    save, path = functools.partial(ek.save_adapter, trained()), tmp_path / "a.safetensors"
    refuses(ValueError, "hub must be the name of a repository, 'OWNER/NAME', got 'pets'", save, path, hub="pets")
    refuses(ValueError, "hub must be", save, path, hub="me/pets@main")
    refuses(ValueError, "metrics are for the model card", save, path, metrics={"top-1": 1.0})
    refuses(TypeError, "metrics must be numbers by name", save, path, hub="me/pets", metrics={"top-1": "good"})
    refuses(TypeError, "metrics must be of type Mapping, got", save, path, hub="me/pets", metrics=[1])
    refuses(ValueError, "path must be a local file", save, "hf-hub:me/pets")
    assert not hub.exists() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error, says",
    [
        (errors.HfHubHTTPError("403 Forbidden", response=RESPONSE), "the hub refuses me/pets: 403 Forbidden"),
        (type("ConnectError", (Exception,), {"__module__": "httpx"})("no route"), "reached for me/pets: no route"),
    ],
)
def test_an_upload_that_fails_leaves_the_file(error, says, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", Mock(side_effect=error))
    with pytest.raises(OSError, match=f"{says}; .*a.safetensors is written"):
        ek.save_adapter(trained(), tmp_path / "a.safetensors", hub="me/pets")
    assert ek.read_adapter(tmp_path / "a.safetensors").head


def test_the_extra_is_named_when_huggingface_hub_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    refuses(ImportError, r"efft_kernels\[hub\]", ek.load_adapter, base(), "hf-hub:me/pets")
