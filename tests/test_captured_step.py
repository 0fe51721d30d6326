"""A training step in a CUDA graph: the same factors, bit for bit, as of eager steps, with each backend of a GPU."""

from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F

import efft_kernels
from efft_kernels import EFFTConfig
from efft_kernels.extras import timm
from efft_kernels.finetune.captured import CapturedStep

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
STEPS = 4


def _model(backend: str) -> torch.nn.Module:
    if not next(b for b in efft_kernels.backends() if b.name == backend).available:
        pytest.skip(f"{backend} is not available")
    torch.manual_seed(0)
    model = timm().create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10).cuda().bfloat16()
    return efft_kernels.inject(model, EFFTConfig(rank=16, factor_dropout=0.0), backend=backend)


def _images(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(step)
    return torch.randn(8, 3, 64, 64, generator=g, device="cuda").bfloat16(), torch.arange(8, device="cuda")


def _factors(backend: str, run) -> list[torch.Tensor]:
    """The trained tensors after a few steps, each made by run(model, optimizer)"""
    model = _model(backend)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, capturable=True)
    step = run(model, optimizer)
    for number in range(STEPS):
        step(*_images(number))
    return [p.detach().clone() for p in trained]


def _step(predict, optimizer, images, labels, set_to_none=False) -> None:
    F.cross_entropy(predict(images).float(), labels).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none)


def _eager(model, optimizer):
    return lambda images, labels: _step(model, optimizer, images, labels)


def _whole_step(model, optimizer):
    images, labels = _images(0)
    before, stream = [p.detach().clone() for p in model.parameters()], torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _step(model, optimizer, images, labels)  # makes the optimizer's state
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        _step(model, optimizer, images, labels)
    with torch.no_grad():  # as if nothing had happened
        for p, value in zip(model.parameters(), before):
            p.copy_(value)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()

    def replay(new_images, new_labels):
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()

    return replay


def _graphed_callable(model, optimizer):
    # a model with hooks is refused, and a module around it is not
    predict = torch.cuda.make_graphed_callables(torch.nn.Sequential(model), (_images(0)[0],))
    # autograd may take the graph's own memory as a gradient, to which the next replay would be added
    return lambda images, labels: _step(predict, optimizer, images, labels, set_to_none=True)


@needs_gpu
@pytest.mark.parametrize("way", [_whole_step, _graphed_callable])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_captured_equals_eager(backend, way):
    want = _factors(backend, _eager)
    assert any((p != q).any() for p, q in zip(want, _model(backend).parameters()))
    assert all(map(torch.equal, _factors(backend, way), want))


def test_the_warm_up_leaves_the_statistics_of_a_batch_norm(monkeypatch):
    """With a capture that computes, and a replay that does not"""
    monkeypatch.setattr(torch, "cuda", MagicMock())
    norm = torch.nn.BatchNorm1d(4)
    CapturedStep(lambda x, y: (norm(x), y), [], norm.buffers())(torch.randn(8, 4), torch.zeros(8))
    assert norm.num_batches_tracked == 1


@needs_gpu
def test_the_command_captures_its_steps(tmp_path):
    for package in ("accelerate", "torchmetrics", "tensorboard"):
        pytest.importorskip(package)
    from test_finetune_data import folder
    from test_finetune_run import end, tiny

    from efft_kernels.finetune.loop import train

    photos = folder(tmp_path / "photos", ("train", "val", "test"), ("a", "b"), n=16)
    more = {"device": "cuda", "factor_dropout": 0.0, "drop_path": 0.0, "clip_grad": 1.0, "ema": 0.9, "trackers": ()}
    eager = tiny(photos, tmp_path / "eager", epochs=3, **more)
    train(eager, progress=False)
    train(replace(eager, out=str(tmp_path / "graph"), cuda_graph=True), progress=False)
    assert end(tmp_path / "graph") == end(tmp_path / "eager")
    # dropout draws new masks at each replay, the same in every run
    for name in ("a", "b"):
        train(replace(eager, out=str(tmp_path / name), factor_dropout=0.1, cuda_graph=True), progress=False)
    assert end(tmp_path / "a") == end(tmp_path / "b") != end(tmp_path / "graph")
