"""Whole models under torch.compile, and exported after a merge."""

import pytest
import torch
from models import DROPPED, PLAIN, adapted, assert_same, gradients, images, loss_of, shake, swin, vit

import efft_kernels as ek


@pytest.fixture(autouse=True)
def fresh_compiler():
    """This process compiles more models than Dynamo's limit for one function."""
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, make",
    # what swin adds, stages of their own groups, is in the groups: LoRA has one for each Linear, as in vit
    [(PLAIN, vit), (PLAIN, swin), (ek.FacTConfig(activation_dropout=0.0), swin)]
    + [(ek.LoRAConfig(), vit), (ek.LoRAConfig(dora=True, channel_scale=True), vit)],
    ids=["efft-vit", "efft-swin", "fact-swin", "lora-vit", "dora-vit"],
)
def test_compiled_whole_model(config, make):
    model, x = adapted(config, make).train(), images()
    want, grads = model(x), gradients(model, loss_of(model, x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)
    assert_same(gradients(model, loss_of(compiled, x)), grads)
    assert model.efft._pass is None
    # an optimizer step between two calls is seen
    shake(model)
    torch.testing.assert_close(compiled(x), model(x))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        shake(model)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
def test_compiled_with_dropout():
    model = adapted(DROPPED).train()
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), images()
    assert not torch.equal(compiled(x), compiled(x))
    gradients(model, loss_of(compiled, x))


def test_compiled_inside_a_larger_function():
    model, x = adapted().train(), images()
    step = torch.compile(lambda x: loss_of(model, x), fullgraph=True, backend="aot_eager")
    assert_same(gradients(model, step(x)), gradients(model, loss_of(model, x)))


@pytest.mark.slow
def test_compiled_with_checkpointing():
    model, x = adapted().train(), images()
    want = gradients(model, loss_of(model, x))
    model.set_grad_checkpointing(True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(gradients(model, loss_of(compiled, x)), want)


@pytest.mark.parametrize("become, close", [(lambda model: model, {}), (ek.merge, dict(rtol=1e-4, atol=1e-5))])
def test_adapted_and_merged_models_export(become, close):
    model, x = adapted(), images()
    want = model(x)
    torch.testing.assert_close(torch.export.export(become(model), (x,)).module()(x), want, **close)


@pytest.mark.slow
def test_merged_model_exports_to_onnx():
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    program = torch.onnx.export(ek.merge(adapted()), (images(),), dynamo=True, verbose=False)
    onnx.checker.check_model(program.model_proto)
    assert {node.domain for node in program.model_proto.graph.node} <= {"", "pkg.onnxscript.torch_lib"}
