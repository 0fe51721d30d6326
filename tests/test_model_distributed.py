"""Two processes, each with half of the batch, against one with all of it: DDP and FSDP2."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import PLAIN, adapted, assert_same, gradients, images, vit
from refusals import refuses
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import efft_kernels as ek


def adapted_vit():
    torch.manual_seed(0)
    return adapted().train()


def two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(ek.EFFTLinear(24, 36, rank=4), nn.GELU(), ek.EFFTLinear(36, 24, rank=4))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.v, std=0.1)
    return model


# name: (how to make it, its parts that FSDP shards, a batch of four)
MODELS = {
    "vit": (adapted_vit, lambda model: model.blocks, images),
    "layers": (two_layers, lambda model: (model[0], model[2]), lambda n: torch.randn(n, 24)),
}


def loss_of_half(model, x, half):
    return F.cross_entropy(model(x[half]), torch.arange(len(x))[half])


def sharded(model, parts):
    mesh = init_device_mesh("cpu", (2,))
    for part in (*parts(model), model):
        fully_shard(part, mesh=mesh)
    return model


def check(rank, make, parts, batch, fsdp, folder):
    """The gradients of two processes, one half of the batch each, equal those of one process."""
    model, x = make(), batch(4)
    want = gradients(model, loss_of_half(model, x, slice(0, 2)) / 2 + loss_of_half(model, x, slice(2, 4)) / 2)
    wrapped = sharded(model, parts) if fsdp else nn.parallel.DistributedDataParallel(model)
    full = lambda t: t.full_tensor() if fsdp else t
    for _ in range(2):  # the second time with factors that an optimizer has moved
        half = slice(2 * rank, 2 * rank + 2)
        loss_of_half(wrapped, x, half).backward()
        trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
        assert_same({n: full(p.grad) for n, p in trained.items()}, want)
        torch.optim.SGD(trained.values(), lr=0.1).step()
        model.zero_grad()
        plain, reference = {n: full(p.detach()) for n, p in model.named_parameters()}, make()
        reference.load_state_dict({**reference.state_dict(), **plain})
        want = gradients(reference, sum(loss_of_half(reference, x, slice(i, i + 2)) / 2 for i in (0, 2)))
        with torch.no_grad():
            torch.testing.assert_close(wrapped.eval()(x), reference.eval()(x), rtol=1e-4, atol=1e-5)
        wrapped.train()
    if fsdp and hasattr(model, "efft"):
        for refused in (ek.merge, lambda m: ek.add_adapter(m, PLAIN, "b"), lambda m: ek.inject(m, PLAIN)):
            refuses(ValueError, "needs whole tensors, but .* is sharded among processes", refused, wrapped)
        ek.save_adapter(wrapped, folder.parent / f"{folder.name}-{rank}")
        loaded = ek.load_adapter(vit(), folder.parent / f"{folder.name}-{rank}")
        assert_same(dict(loaded.efft.named_parameters()), {n: full(p) for n, p in model.efft.named_parameters()})
        assert_same({"head": loaded.head.weight}, {"head": full(model.head.weight)})
        ek.delete_adapter(wrapped, "default")
        assert not hasattr(model, "efft") and wrapped(x).isfinite().all()


def check_tensor_parallel():
    """A part of the model that no adapter touches may be split; a Linear to adapt is refused by name."""
    mesh = init_device_mesh("cpu", (2,))
    head, fc1 = ({name: ColwiseParallel()} for name in ("head", "blocks.0.mlp.fc1"))
    model = ek.inject(parallelize_module(vit(), mesh, head), PLAIN, head="keep")
    ek.unmerge(ek.merge(model))
    says, split = "needs whole tensors, but weight is sharded", parallelize_module(vit(), mesh, fc1)
    refuses(ValueError, f"an adapter of blocks.0.mlp.fc1 {says}", ek.inject, split, PLAIN)
    refuses(ValueError, f"merge {says}", ek.merge, parallelize_module(ek.inject(vit(), PLAIN), mesh, fc1))


def worker(rank, path, folder):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name, model in MODELS.items():
        for fsdp in (False, True):
            check(rank, *model, fsdp, folder)
            (folder / f"{name}-{'fsdp' if fsdp else 'ddp'}-{rank}").touch()
    check_tensor_parallel()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """All cases in one pair of processes, because to start them takes longest."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # forked, so that they need not import torch again
    torch.multiprocessing.start_processes(worker, (str(tmp_path / "store"), tmp_path), nprocs=2, start_method="fork")
    found = {path.name for path in tmp_path.iterdir()} - {"store"}
    assert found == {f"{name}-{kind}-{rank}" for name in MODELS for kind in ("ddp", "fsdp") for rank in (0, 1)}
