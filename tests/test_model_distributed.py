"""Two processes, each with half of the batch, against one with all of it: DDP and FSDP2."""

import os

import pytest
import torch
import torch.nn.functional as F
from models import adapted, assert_same, gradients, images

import efft_kernels as ek


def _worker(rank, wrap, path, queue):
    """Two processes, one half of the batch each; the gradients must equal those of one process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = adapted().train()
    x = images(4)
    want = gradients(model, loss_of_half(model, x, slice(0, 2)) / 2 + loss_of_half(model, x, slice(2, 4)) / 2)
    wrapped, full = wrap(model)
    for _ in range(2):  # the second time with factors that an optimizer has moved
        half = slice(2 * rank, 2 * rank + 2)
        loss_of_half(wrapped, x, half).backward()
        got = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        assert_same(got, want)
        torch.optim.SGD(ek.adapter_parameters(model), lr=0.1).step()
        model.zero_grad()
        plain = {n: full(p.detach()) for n, p in model.named_parameters()}
        reference = adapted().train()
        reference.load_state_dict({**reference.state_dict(), **plain})
        want = gradients(reference, sum(loss_of_half(reference, x, slice(i, i + 2)) / 2 for i in (0, 2)))
        with torch.no_grad():
            torch.testing.assert_close(wrapped.eval()(x), reference.eval()(x), rtol=1e-4, atol=1e-5)
        wrapped.train()
    queue.put(rank)
    dist.barrier()
    dist.destroy_process_group()


def loss_of_half(model, x, half):
    return F.cross_entropy(model(x[half]), torch.arange(len(x))[half])


def _ddp(model):
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model), lambda t: t


def _fsdp(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [_ddp, _fsdp], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(wrap, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(_worker, (wrap, str(tmp_path / "store"), queue), nprocs=2)
    assert sorted([queue.get(), queue.get()]) == [0, 1]
