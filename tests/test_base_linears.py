"""Linears with their own forward: quantized by torchao or bitsandbytes, parametrized, normed, pruned, tied."""

import copy
import logging

import pytest
import torch
from accuracy import assert_accurate
from models import PLAIN, check_start_and_merge, gradients, images, loss_of, shake, vit
from refusals import refuses
from test_attention import pickled
from torch import nn
from torch.nn.utils import prune

import efft_kernels as ek
import efft_kernels.serving
from efft_kernels.base_linears import dense

LORA_XS = ek.LoRAXSConfig(rank=4, scale=2.0, targets=("attn", "mlp"))


def _torchao(make_config):
    def apply(model):
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        # as users of torchao do, the Linears of the blocks but not the head
        quantization.quantize_(model.blocks, make_config(quantization))
        return model

    return apply


def _classes(model) -> dict:
    """name -> classes of each module; torch makes a class for each parametrized module, so these go by their names"""
    return {name: [c.__qualname__ for c in type(m).__mro__] for name, m in model.named_modules()}


def _bitsandbytes(kind, **options):
    def apply(model):
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        for path, linear in [(p, m) for p, m in model.blocks.named_modules() if isinstance(m, nn.Linear)]:
            sizes = linear.in_features, linear.out_features, linear.bias is not None
            new = getattr(bnb.nn, kind)(*sizes, **options)
            new.load_state_dict(linear.state_dict())
            model.blocks.set_submodule(path, new.to(linear.weight.device))
        return model

    return apply


def _each(act):
    def apply(model):
        for linear in [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]:
            act(linear)
        return model

    return apply


def _settled(linear):
    linear.train()(linear.bias.new_zeros(1, linear.in_features))  # one step of the power iteration
    return linear.eval()


QUANTIZED = {
    "torchao-int8": _torchao(lambda q: q.Int8WeightOnlyConfig()),
    "torchao-int4": _torchao(lambda q: q.IntxWeightOnlyConfig(torch.int4, q.granularity.PerGroup(32))),
    "bitsandbytes-nf4": _bitsandbytes("Linear4bit", quant_type="nf4"),
    "bitsandbytes-int8": _bitsandbytes("Linear8bitLt", has_fp16_weights=False),
}
ODD = {
    "weight_norm": _each(nn.utils.parametrizations.weight_norm),
    "weight_norm-hook": _each(nn.utils.weight_norm),
    "spectral_norm-hook": _each(lambda linear: _settled(nn.utils.spectral_norm(linear, n_power_iterations=30))),
    "pruned": _each(lambda linear: prune.random_unstructured(linear, "weight", 0.3)),
}
BASES = {**QUANTIZED, **ODD}
# these round the activations to 8 bits as well
COARSE = "bitsandbytes-int8"

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(params=BASES)
def base(request):
    return request.param


def make(base, dtype=torch.float32):
    torch.manual_seed(0)
    return BASES[base](vit().to(dtype))


@pytest.fixture
def shaken(base):
    """A model whose updates are not zero, images, and what it gives for them."""
    model, x = shake(ek.inject(make(base), PLAIN)), images()
    with torch.no_grad():
        return model, x, model(x)


def bare(base):
    """The quantized model; 4-bit weights of bitsandbytes in the layout that they have in an adapted model."""
    model = make(base)
    for linear in model.blocks.modules():
        if hasattr(linear, "support_avx512bf16_for_cpu"):
            linear.support_avx512bf16_for_cpu = False
    return model


def near(base):
    """A difference in the last bit may change the rounding of quantized activations."""
    return dict(rtol=5e-2, atol=2e-2) if base == COARSE else dict(rtol=1e-4, atol=1e-4)


def densified(model):
    """The model in float64 with plain Linears that have the dense weights."""
    torch.manual_seed(0)
    plain = vit().double()
    for path, linear in [(p, m) for p, m in plain.blocks.named_modules() if isinstance(m, nn.Linear)]:
        found = model.blocks.get_submodule(path)
        linear.weight.data = dense(found).double().clone()
        linear.bias.data = found.bias.data.double()
    rest = {k: v.double() for k, v in model.state_dict().items() if not k.startswith(("blocks", "efft"))}
    plain.load_state_dict(rest, strict=False)
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_is_its_own_product_and_the_update(base, dtype, monkeypatch):
    model, own = make(base, dtype=dtype), make(base, dtype=dtype).requires_grad_(False).blocks[0].mlp.fc1
    linear = model.blocks[0].mlp.fc1
    shake(ek.inject(model, PLAIN))
    x = torch.randn(3, 7, 192).to(dtype)
    assert linear is model.blocks[0].mlp.fc1
    assert type(own).__name__ in (linear.base.__name__, f"Parametrized{linear.base.__name__}")
    dy = torch.randn(3, 7, 768).to(dtype)

    def run(update, factors):
        held = [t.detach().requires_grad_() for t in (x.double() if factors[0].dtype == torch.float64 else x, *factors)]
        y = update(*held)
        return y.detach(), *torch.autograd.grad(y, held, dy.to(y.dtype))

    down, up, *_ = model.efft.pair("blocks.0.mlp.fc1", model.get_submodule("blocks.0.mlp.fc1"))
    down, up = down.detach().to(dtype), up.detach().to(dtype)

    def ours(x, down, up):
        monkeypatch.setattr(model.efft, "pair", lambda path, linear: ek.groups.Pair(down, up))
        return linear(x)

    got = run(ours, (down, up))
    plain = run(lambda x, down, up: own(x) + (x @ down) @ up, (down, up))
    weight, bias = dense(own).double(), own.bias.double()
    exact = run(lambda x, down, up: x @ weight.T + bias + (x @ down) @ up, (down.double(), up.double()))
    for name, *three in zip(("y", "dx", "ddown", "dup"), got, plain, exact):
        assert_accurate(*three, f"{base} {name}")


def test_a_model_trains_as_its_dense_twin(base, shaken):
    model, x, _ = shaken
    twin = ek.inject(densified(model), PLAIN)
    twin.efft.load_state_dict({k: v.double() for k, v in model.efft.state_dict().items()})
    loss, exact = loss_of(model, x), loss_of(twin, x.double())
    close = near(base) if base == COARSE else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.double(), exact, **close)
    got, want = gradients(model, loss), gradients(twin, exact)
    assert got.keys() == want.keys()
    for name in got:
        scale = want[name].abs().max()
        torch.testing.assert_close(got[name].double() / scale, want[name] / scale, msg=lambda m: f"{name} {m}", **close)
    assert not any(p.requires_grad for name, p in model.named_parameters() if not name.startswith(("efft", "head")))


def test_training_moves_only_factors_and_head(base):
    model = ek.inject(make(base), PLAIN).train()
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor) and "blocks" in k}
    x = images()
    start = model.eval()(x)
    torch.testing.assert_close(start, bare(base)(x), **near(base))
    optimizer, losses = torch.optim.SGD(ek.adapter_parameters(model.train()), lr=0.01), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.state_dict()
    # a spectral norm updates its u and v in every forward in training mode
    computed = "weight_u", "weight_v", "qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"
    for key in before.keys() if "spectral" not in base else (k for k in before if not k.endswith(computed)):
        plain = lambda t: t.dequantize() if hasattr(t, "dequantize") and "torchao" in base else t
        assert torch.equal(plain(after[key]), plain(before[key])), key


def test_evaluation_between_training_steps(base, shaken):
    model, x, first = shaken
    for mode in (False,) if "spectral" in base else (True, False):  # which changes in every forward in training mode
        loss_of(model.train(mode), x).backward()
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(x), first, **near(base))


@pytest.mark.parametrize("base", QUANTIZED)
def test_every_method(base):
    for config in (LORA_XS, ek.LoRAConfig(rank=4), ek.FacTConfig("tk", rank=4), ek.VeRAConfig(rank=4)):
        model, x = bare(base), images()
        before = model(x)
        ek.inject(model, config)
        torch.testing.assert_close(model(x), before, **near(base))
        if config is LORA_XS:  # its factors are singular vectors of the dense weight
            left = torch.linalg.svd(dense(model.blocks[0].mlp.fc1).float().T)[0][:, :4]
            a = next(g for g in model.efft["default"].values() if g.spec.slots[0].site.path.endswith("fc1")).a[0, 0]
            torch.testing.assert_close((left.T @ a.float()).abs().diag(), a.float().norm(dim=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("base", QUANTIZED)
def test_activation_dropout_and_autocast(base):
    model, x = shake(ek.inject(make(base), ek.FacTConfig(rank=4, activation_dropout=0.5))), images()
    torch.manual_seed(1)
    a, b = model.train()(x), model(x)
    assert not torch.equal(a, b)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
        loss_of(model, x).backward()
    torch.testing.assert_close(low.float(), model(x), rtol=0.1, atol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.efft.parameters())


def test_copies_and_state_dicts(base, shaken):
    model, x, want = shaken
    plain_keys = set(make(base).state_dict())
    assert {k for k in model.state_dict() if not k.startswith("efft.")} == plain_keys
    if "hook" not in base and base != "pruned":  # torch cannot copy what such a hook leaves on the module
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(x), want, **near(base))
        shake(twin)
        torch.testing.assert_close(model(x), want, **near(base))  # the copy has its own adapters
        assert not torch.allclose(twin(x), want, atol=5e-2)
    if base.startswith("bitsandbytes"):  # torchao's modules cannot be pickled
        torch.testing.assert_close(torch.load(pickled(model), weights_only=False)(x), want, **near(base))
    if base != "bitsandbytes-nf4":  # its weight is restored when a model is built, not by load_state_dict
        other = ek.inject(make(base), PLAIN)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(x), want, **near(base))


def test_adapter_files_fit_quantized_and_plain_alike(base, shaken, tmp_path):
    path = tmp_path / "a.safetensors"
    model, x, want = shaken
    ek.save_adapter(model, path)
    torch.testing.assert_close(ek.load_adapter(make(base), path)(x), want, **near(base))
    torch.manual_seed(0)
    plain = ek.load_adapter(vit(), path)
    assert ek.plan(plain, PLAIN).fingerprint == ek.plan(make(base), PLAIN).fingerprint
    assert plain(x).isfinite().all()


def test_off_and_gone(base):
    model = bare(base)
    types, x = _classes(model), images()
    with torch.no_grad():
        before = model(x)
    shake(ek.inject(model, PLAIN, head="keep"))
    with ek.disable_adapter(model), torch.no_grad():
        torch.testing.assert_close(model(x), before, **near(base))
    ek.delete_adapter(model, "default")
    assert _classes(model) == types
    with torch.no_grad():
        # without an adapter, bitsandbytes may repack its 4-bit weight for inference in bfloat16
        torch.testing.assert_close(model(x), before, **(dict(rtol=0.1, atol=1e-2) if "nf4" in base else near(base)))


def test_merge_is_refused_or_dequantizes(base, shaken):
    model, x, want = shaken
    keys, types = list(model.state_dict()), _classes(model)
    says = "blocks.0.attn.qkv is quantized" if base in QUANTIZED else "blocks.0.attn.qkv recomputes its weight"
    refuses(ValueError, f"{says}.*dequantize=True", ek.merge, model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), want, **near(base))

    close = near(base) if base == COARSE else dict(rtol=1e-3, atol=1e-3)
    ek.merge(model, dequantize=True)
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    torch.testing.assert_close(model(x), want, **close)
    ek.unmerge(model)
    assert _classes(model) == types
    torch.testing.assert_close(model(x), want, **near(base))


def test_a_bank_refuses_it_by_name(base, tmp_path):
    path = tmp_path / "a.safetensors"
    ek.save_adapter(ek.inject(make(base), PLAIN), path)
    model, x = bare(base), images()
    bank = ek.serving.AdapterBank(model)
    with torch.no_grad():
        before = model(x)
        refuses(ValueError, "'a' adapts blocks.0.attn.qkv, whose weight must be plain in a bank", bank.add, "a", path)
        torch.testing.assert_close(model(x), before, **near(base))
    assert len(bank) == 0


def test_merge_of_a_weight_that_others_use_is_refused():
    model = shake(ek.inject(tied := vit(), ek.EFFTConfig(rank=4, blocks=(0,), factor_dropout=0.0)))
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    x = images()
    want = tied(x)  # an adapter that is not merged does not change the tied module
    refuses(ValueError, "blocks.0.mlp.fc1 shares its weight with blocks.1.mlp.fc1.weight", ek.merge, model)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("base", QUANTIZED)
def test_a_quantized_head_is_not_trained(base):
    model, head = make(base), vit()
    head.blocks = nn.Sequential(head.head)
    model.head = BASES[base](head).blocks[0]
    keys = list(model.state_dict())
    refuses(ValueError, "head is quantized .* cannot be trained: .*head='keep'", ek.inject, model, PLAIN)
    assert list(model.state_dict()) == keys
    assert ek.inject(model, PLAIN, head=7)(images()).shape == (2, 7)


def test_a_base_without_a_gradient_of_its_input_is_refused():
    model = _torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig())(vit())
    shake(ek.inject(model, PLAIN))
    with torch.no_grad():
        assert model(images()).isfinite().all()
    refuses(RuntimeError, r"blocks.0.mlp.fc\d|blocks.0.attn.proj passes no gradient to its input", model, images())


def test_quantizing_what_is_injected():
    torch.manual_seed(0)
    model, other = QUANTIZED["torchao-int8"](shake(ek.inject(vit(), PLAIN))), make("torchao-int8")
    ek.inject(other, PLAIN).efft.load_state_dict(model.efft.state_dict())
    x = images()
    torch.testing.assert_close(model(x), other(x))


def test_from_linear():
    q = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    linear = nn.Linear(64, 96)
    q.quantize_(nn.Sequential(linear), q.Int8WeightOnlyConfig())
    x = torch.randn(5, 64, requires_grad=True)
    layer = ek.EFFTLinear.from_linear(linear, rank=4, slices=3, scale=2.0)
    torch.testing.assert_close(layer(x), linear(x))
    nn.init.normal_(layer.v)
    up = 2.0 * torch.cat([core @ layer.v for core in layer.sigma], 1)
    want = x @ dense(linear).T + linear.bias + x @ layer.u @ up
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    inputs = x, layer.u, layer.sigma, layer.v
    for got, wanted in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (layer(x), want))):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    refuses(ValueError, "must be plain to be merged into, got torchao's Int8Tensor; dequantize", layer.merge)


def test_from_linear_points_to_inject():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(TypeError, match="not a subclass, got Linear4bit; inject adapts it"):
        ek.EFFTLinear.from_linear(bnb.nn.Linear4bit(64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["torchao-int8", "weight_norm"])
def test_compiles_whole(base, shaken):
    model, x, _ = shaken
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_linear_beside_its_norm_in_a_sequential():
    model = vit()
    for block in model.blocks:
        block.mlp.fc1 = nn.Sequential(nn.LayerNorm(192), block.mlp.fc1)
        block.mlp.fc2 = nn.Sequential(block.mlp.fc2, nn.LayerNorm(192))
    check_start_and_merge(copy.deepcopy(model), PLAIN, backend=None)
    shake(ek.inject(model, PLAIN))
    assert "blocks.0.mlp.fc1.1" in str(ek.plan(model, PLAIN))
    down, up, *_ = model.efft.pair("blocks.0.mlp.fc2.0", model.get_submodule("blocks.0.mlp.fc2.0"))
    z = torch.randn(3, 768)
    first, norm = model.blocks[0].mlp.fc2
    want = norm(nn.functional.linear(z, first.weight, first.bias) + z @ down @ up)
    torch.testing.assert_close(model.blocks[0].mlp.fc2(z), want, rtol=1e-4, atol=1e-4)
