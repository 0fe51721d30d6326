"""Models wrapped by torch (compiled, checkpointed, averaged, parallel) have the paths and files of the plain ones."""

import copy

import pytest
import torch
import torch.distributed as dist
from models import PLAIN, adapted, images, shake, vit
from refusals import refuses
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import efft_kernels as ek
from efft_kernels.serving import AdapterBank


def compiled(module):
    return torch.compile(module, backend="eager")


def each_block(wrap):
    def apply(model):
        for i, block in enumerate(model.blocks):
            model.blocks[i] = wrap(block)
        return model

    return apply


def one_linear_and_head(model):
    model.blocks[1].mlp.fc2 = checkpoint_wrapper(model.blocks[1].mlp.fc2)
    model.head = compiled(model.head)
    return model


WRAPPED = {
    "compiled": compiled,
    "averaged": AveragedModel,
    "data parallel": nn.DataParallel,
    "twice": lambda model: compiled(nn.DataParallel(model)),
    "blocks compiled": each_block(compiled),
    "blocks checkpointed": each_block(checkpoint_wrapper),
    "blocks checkpointed, compiled": lambda model: compiled(each_block(checkpoint_wrapper)(model)),
    "one Linear and the head": one_linear_and_head,
}


@pytest.fixture(autouse=True)
def eager():
    """compiled modules run as they are: what they compute is tested in test_model_compile.py, and takes seconds"""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(params=WRAPPED, ids=str)
def wrap(request):
    return WRAPPED[request.param]


def test_a_wrapped_model_is_planned_saved_loaded_and_merged_as_the_plain_one(wrap, tmp_path):
    base, x = vit(), images()
    before, want = base(x).detach(), shake(ek.inject(copy.deepcopy(base), PLAIN, head=3))
    ek.save_adapter(want, tmp_path / "plain.safetensors")
    model = wrap(copy.deepcopy(base))
    assert ek.plan(model, PLAIN) == ek.plan(base, PLAIN)
    if isinstance(model, nn.DataParallel) or isinstance(getattr(model, "_orig_mod", None), nn.DataParallel):
        refuses(ValueError, "before it is wrapped in DataParallel, which would not reduce", ek.inject, model, PLAIN)
        replica = want._replicate_for_data_parallel()  # what a forward on several GPUs calls
        refuses(RuntimeError, "VisionTransformer is a replica of nn.DataParallel", replica, x)
        return
    assert ek.load_adapter(model, tmp_path / "plain.safetensors") is model
    torch.testing.assert_close(model(x), want(x))
    grads = [torch.autograd.grad(m(x).square().sum(), ek.adapter_parameters(m)) for m in (model, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    ek.save_adapter(model, tmp_path / "wrapped.safetensors")
    again = ek.load_adapter(copy.deepcopy(base), tmp_path / "wrapped.safetensors")
    torch.testing.assert_close(again(x), want(x))
    with ek.disable_adapter(model):
        torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(ek.unmerge(ek.merge(model))(x), want(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ek.merge(model)(x), want(x), rtol=1e-4, atol=1e-5)
    ek.unmerge(model)
    ek.set_adapter(ek.add_adapter(model, PLAIN, "other"), "default")
    assert ek.delete_adapter(ek.delete_adapter(model, "other"), "default") is model
    assert all(p.requires_grad for p in model.parameters())
    bank = AdapterBank(wrap(copy.deepcopy(base)))
    bank.add("a", want)
    bank.add("b", tmp_path / "wrapped.safetensors")
    with bank.use(["a", "b"]):
        torch.testing.assert_close(bank.model(x), want(x))
    bank.release()


@pytest.mark.parametrize("name", ["compiled", "blocks compiled", "blocks checkpointed", "one Linear and the head"])
def test_a_model_is_wrapped_after_it_was_injected(name, tmp_path):
    model, x = adapted(), images()
    want, model = model(x), WRAPPED[name](model)
    ek.export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(model(x), want)
    ek.save_adapter(model, tmp_path / "a.safetensors")
    plain = vit()
    ek.load_adapter(plain, tmp_path / "a.safetensors")
    torch.testing.assert_close(ek.merge(model)(x), want, rtol=1e-4, atol=1e-5)
    ek.delete_adapter(ek.unmerge(model), "default")
    assert all(p.requires_grad for p in model.parameters())
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


def test_a_distributed_model_is_saved_switched_and_merged_and_takes_no_new_parameters(tmp_path):
    model, x = ek.inject(vit(), PLAIN), images()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        shake(model)
        want = model(x)
        ek.save_adapter(wrapped, tmp_path / "a.safetensors")
        assert ek.adapter_parameters(wrapped) == ek.adapter_parameters(model)
        says = "before it is wrapped in DistributedDataParallel"
        refuses(ValueError, says, ek.add_adapter, wrapped, PLAIN, "b")
        refuses(ValueError, says, ek.load_adapter, wrapped, tmp_path / "a.safetensors", name="b")
        refuses(ValueError, says, ek.inject, wrapped, PLAIN)
        assert ek.set_adapter(wrapped, "default") is wrapped
        torch.testing.assert_close(ek.merge(wrapped)(x), want, rtol=1e-4, atol=1e-5)
        refuses(ValueError, "this VisionTransformer is merged, unmerge it first", ek.adapter_parameters, wrapped)
    finally:
        dist.destroy_process_group()


def test_a_part_of_fsdp_takes_no_new_parameters():
    model, wrapper = vit(), nn.Module()
    wrapper._fsdp_wrapped_module = model.blocks[0]
    model.blocks[0] = wrapper
    refuses(ValueError, "before it is wrapped in Module, which would not reduce", ek.inject, model, PLAIN)
