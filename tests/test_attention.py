"""nn.MultiheadAttention, nn.TransformerEncoderLayer, and attentions with q_bias and v_bias, adapted in all they do."""

import copy
import functools
import io
import itertools

import pytest
import torch
from models import assert_same, gradients, shake, timm
from refusals import refuses
from torch import nn

import efft_kernels as ek
from efft_kernels.attention import CallingAttention
from efft_kernels.serving import AdapterBank

EFFT = ek.EFFTConfig(rank=4, scale=1.0, factor_dropout=0.0)
MASK = torch.tensor([[False, False, True], [False, False, False]])
KEYS = torch.tensor([[False, True, False], [False, False, False], [True, False, False], [False, False, True]])
E, L, S, B, H = 16, 4, 3, 2, 2


class Block(nn.Module):
    """One block with an attention over given keys and values."""

    def __init__(self, **options):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.MultiheadAttention(E, H, **options)})])

    def forward(self, *args, **kwargs):
        return self.blocks[0]["attn"](*args, **kwargs)


def dense(model: nn.Module, plain: nn.Module) -> nn.Module:
    """The plain model with the updates of the adapted one added to its weights"""
    with torch.no_grad():
        for (path, part), (down, up) in ek.updates(model).items():
            owner, _, name = path.rpartition(".")
            attention = plain.get_submodule(owner)
            if name == "in_proj":
                rows = "qkv".index(part) * E
                attention.in_proj_weight[rows : rows + E] += (down @ up).T
            else:
                weight = attention.out_proj.weight if name == "out_proj" else getattr(attention, f"{name}_weight")
                weight += (down @ up).T
    return plain


CAUSAL = dict(attn_mask=nn.Transformer.generate_square_subsequent_mask(S).double(), is_causal=True, need_weights=False)
CASES = {
    "self attention": (dict(batch_first=True), True, {}),
    "weights of each head": (dict(batch_first=True), True, dict(average_attn_weights=False)),
    "no weights": (dict(batch_first=True), True, dict(need_weights=False)),
    "sequence first, padding": (dict(), True, dict(key_padding_mask=MASK)),
    "another key": (dict(batch_first=True, bias=False), False, dict(attn_mask=KEYS)),
    "other widths": (dict(kdim=8, vdim=12, batch_first=True), False, dict(key_padding_mask=MASK, need_weights=False)),
    "more keys": (dict(add_bias_kv=True, add_zero_attn=True), False, dict(key_padding_mask=MASK)),
    "a mask per head": (dict(batch_first=True), False, dict(attn_mask=torch.randn(B * H, L, S).double())),
    "causal": (dict(batch_first=True), True, CAUSAL),
    "causal, more keys": (dict(batch_first=True, add_bias_kv=True, add_zero_attn=True), True, CAUSAL),
    "both masks": (dict(), False, dict(attn_mask=torch.randn(L, S).double(), key_padding_mask=MASK.double() * -3)),
}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*no classifier", "ignore:Support for mismatched")
def test_values_and_gradients_are_those_of_the_dense_sum(case, batched):
    options, alone, call = CASES[case]
    if not batched:
        parts = {"key_padding_mask": lambda m: m[0], "attn_mask": lambda m: m[-H:] if m.dim() == 3 else m}
        call = {name: parts.get(name, lambda value: value)(value) for name, value in call.items()}
    torch.manual_seed(0)
    plain = Block(**options).double().eval()
    model = ek.inject(copy.deepcopy(plain), EFFT, head="keep").eval()
    sizes = [(S, E)] if alone else [(L, E), (S, options.get("kdim", E)), (S, options.get("vdim", E))]
    once = [torch.randn(B, *size, dtype=torch.float64) for size in sizes]
    once = [(x if options.get("batch_first") else x.transpose(0, 1)) if batched else x[0] for x in once]
    given = [x.requires_grad_() for x in once] * (3 if alone else 1)
    before = plain(*given, **call)
    torch.testing.assert_close(model(*given, **call), before)
    shake(model, 0.5)
    want, got = dense(model, plain)(*given, **call), model(*given, **call)
    assert not torch.allclose(got[0], before[0])
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad((y[0] ** 3).sum(), once, retain_graph=True) for y in (got, want)]
    torch.testing.assert_close(*grads)
    (got[0] ** 3).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in ek.adapter_parameters(model))


def encoder(**options) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 2).eval()


LORA = ek.LoRAConfig(rank=2, targets=("attn", "mlp"))


@pytest.mark.parametrize("config", [EFFT, LORA, ek.FacTConfig(rank=2, activation_dropout=0.0), ek.LoRAXSConfig(rank=2)])
def test_an_encoder_through_all_that_becomes_of_it(config, tmp_path):
    x, mask = torch.randn(B, S, E), MASK
    model, names = encoder(), set(encoder().state_dict())
    before = model(x, src_key_padding_mask=mask)
    plan = ek.plan(model, config)
    assert plan.left_out == () or config.targets != ("attn", "mlp")
    assert "layers.0.self_attn.in_proj" in str(plan) and type(model.layers[0].self_attn) is nn.MultiheadAttention
    ek.inject(model, config, head="keep")
    shake(model, 0.5)
    assert {key for key in model.state_dict() if not key.startswith("efft.")} == names
    trained, whole = model.train()(x, src_key_padding_mask=mask).detach(), model(x).detach()
    with torch.no_grad():
        want = model.eval()(x, src_key_padding_mask=mask)  # a fast path would skip the adapter here
        torch.testing.assert_close(model(x), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(want[1], before[1], atol=1e-2)
    torch.testing.assert_close(want[1], trained[1], rtol=1e-4, atol=1e-5)

    ek.save_adapter(model, tmp_path / "a.safetensors")
    again = ek.load_adapter(encoder(), tmp_path / "a.safetensors", head="keep").eval()
    copies = [again, copy.deepcopy(model), torch.load(pickled(model), weights_only=False)]
    for other in copies:
        torch.testing.assert_close(other(x, src_key_padding_mask=mask), want, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # the copy has its own weights
        copies[1].layers[0].self_attn.in_proj_weight.zero_()
    torch.testing.assert_close(model(x, src_key_padding_mask=mask), want, rtol=1e-4, atol=1e-5)
    with ek.disable_adapter(model):
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[1], before[1], rtol=1e-4, atol=1e-5)

    weight = model.layers[0].self_attn.in_proj_weight.clone()
    ek.merge(model)
    assert set(model.state_dict()) == names and type(model.layers[0].self_attn) is nn.MultiheadAttention
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[1], want[1], rtol=1e-4, atol=1e-5)
    ek.unmerge(model)
    assert torch.equal(model.layers[0].self_attn.in_proj_weight, weight)
    torch.testing.assert_close(model(x, src_key_padding_mask=mask), want, rtol=1e-4, atol=1e-5)
    ek.delete_adapter(model, "default")
    assert torch.equal(model(x, src_key_padding_mask=mask), before)


def pickled(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("targets", [("q",), ("k", "v"), ("proj",), ("mlp",)])
def test_parts_of_an_attention(targets):
    model = shake(ek.inject(encoder(), ek.EFFTConfig(rank=4, targets=targets), head="keep"), 0.5)
    assert {part for _, part in ek.updates(model)} == set(targets if targets != ("mlp",) else ("fc1", "fc2"))
    x = torch.randn(B, S, E)
    with torch.no_grad():
        want = model.eval()(x)
        torch.testing.assert_close(ek.merge(model)(x), want, rtol=1e-4, atol=1e-5)


def test_a_decoder_has_two_attentions_in_a_block():
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 32, batch_first=True), 2).eval()
    shake(ek.inject(model, EFFT, head="keep"), 0.5)
    paths = {path.removeprefix("layers.") for path, _ in ek.updates(model)}
    assert {"0.self_attn.in_proj", "0.multihead_attn.in_proj", "1.multihead_attn.out_proj"} <= paths
    x, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    want = model(x, memory)
    torch.testing.assert_close(ek.merge(model)(x, memory), want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_vit_of_torchvision(tmp_path):
    timm()
    models = pytest.importorskip("torchvision.models")

    def make():
        torch.manual_seed(0)
        return models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=5).eval()

    x = torch.randn(3, 3, 32, 32)
    ek.inject(make(), EFFT, backend="reference")(x).sum().backward()
    adapted = [ek.inject(make(), EFFT) for _ in range(2)]
    for number, model in enumerate(adapted):
        assert not model.efft["default"].plan.left_out
        nn.init.normal_(model.heads.head.weight)
        ek.save_adapter(shake(model, 0.5 + number).eval(), tmp_path / f"{number}.safetensors")
    check_bank(make, adapted, [tmp_path / f"{number}.safetensors" for number in range(2)], x)


def check_bank(make, models, adapters, x) -> None:
    """Each of three samples gets what the model of its adapter computes, in a mixed batch or with others of it."""
    bank, before = AdapterBank(make()), make()(x)
    for name, adapter in zip("01", adapters):
        bank.add(name, adapter)
    zero, one = (model(x) for model in models)
    cases = (["1", None, "0"], torch.stack([one[0], before[1], zero[2]])), (["0"] * 3, zero)
    for grad, (names, want) in itertools.product((False, True), cases):
        with torch.set_grad_enabled(grad), bank.use(names):
            torch.testing.assert_close(bank.model(x), want, rtol=1e-4, atol=1e-5)
    bank.release()
    assert torch.equal(bank.model(x), before)
    assert [type(module) for module in bank.model.modules()] == [type(module) for module in make().modules()]


@pytest.mark.slow
def test_compiled_as_one_graph():
    model = shake(ek.inject(encoder(), EFFT, head="keep"), 0.5).train()
    x, compiled = torch.randn(B, S, E), torch.compile(model, fullgraph=True, backend="aot_eager")
    want, got = model(x), compiled(x)
    torch.testing.assert_close(got, want)
    assert_same(gradients(model, got.sum()), gradients(model, want.sum()), rtol=1e-4, atol=1e-5)


class OtherAttention(nn.MultiheadAttention):
    def forward(self, query, key, value, **kwargs):
        return super().forward(query * 2, key, value, **kwargs)


def test_what_cannot_be_adapted_is_named():
    model, mlp = nn.Module(), nn.ModuleDict({"fc1": nn.Linear(E, 32), "fc2": nn.Linear(32, E)})
    model.blocks = nn.ModuleList([nn.ModuleDict({"attn": OtherAttention(E, H), "mlp": mlp})])
    (left,) = ek.plan(model, EFFT).left_out
    assert (left.path, left.kind, left.unexpected) == ("blocks.0.attn", "OtherAttention", True)
    adapted, x = ek.inject(Block(batch_first=True), EFFT, head="keep"), torch.randn(B, S, E)
    call, integers = functools.partial(adapted, x, x, x), torch.zeros(B, S, dtype=torch.int64)
    says = r"attn_mask must be \[3, 3\] or \[4, 3, 3\], got \[3, 4\]"
    refuses(ValueError, says, call, attn_mask=torch.zeros(S, S + 1))
    refuses(TypeError, "key_padding_mask must be a bool or", call, key_padding_mask=integers)
    refuses(ValueError, "is_causal says that attn_mask is causal", call, is_causal=True)
    assert type(adapted.blocks[0]["attn"]) is CallingAttention


class Separate(nn.Module):
    """An attention of BEiT as its authors wrote it: q and v have a bias, k has none, and qkv is not called."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.qkv, self.proj = nn.Linear(E, 3 * E, bias=False), nn.Linear(E, E)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(E)) for _ in range(2))

    def forward(self, x):
        if self.q_bias is None:  # as where a model has no such biases
            return self.proj(self.qkv(x))
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        if self.how == "matmul":
            return self.proj((x @ self.qkv.weight.T + bias)[..., :E])
        options = dict(input=x, weight=self.qkv.weight, bias=bias)
        qkv = nn.functional.linear(**options) if self.how == "named" else nn.functional.linear(*options.values())
        q, k, v = qkv.chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Functional(nn.Module):
    """As in torchvision's Swin V2, a function gets the weights of both Linears, and a bias that is not that of qkv."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x):
        bias = self.qkv.bias * (torch.arange(3 * E) // E != 1) if self.qkv is not None else None
        q, k, v = nn.functional.linear(x, self.qkv.weight, bias).chunk(3, -1)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return nn.functional.linear(x, self.proj.weight, self.proj.bias)


class Beit(nn.Module):
    def __init__(self, how: str = "named"):
        super().__init__()
        torch.manual_seed(0)
        make = Functional if how == "function" else functools.partial(Separate, how)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": make()}) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block["attn"](x)
        return x


@pytest.mark.parametrize("how", ["named", "positional", "function"])
def test_weights_that_are_read_past_the_linear(how):
    x, model = torch.randn(B, S, E, requires_grad=True), Beit(how)
    kind, before = type(model.blocks[0]["attn"]), model(x)
    torch.testing.assert_close(ek.inject(model, EFFT, head="keep")(x), before)
    want = shake(model, 0.5)(x)
    (grad,) = torch.autograd.grad(want.square().sum(), x, retain_graph=True)
    want.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in ek.adapter_parameters(model))
    for other in (copy.deepcopy(model), torch.load(pickled(model), weights_only=False)):
        torch.testing.assert_close(other(x), want)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)
    with ek.disable_adapter(model):
        torch.testing.assert_close(model(x), before)
    ek.merge(model)
    assert type(model.blocks[0]["attn"]) is kind
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), x)[0], grad, rtol=1e-4, atol=1e-4)
    ek.unmerge(model)
    torch.testing.assert_close(model(x), want)
    ek.delete_adapter(model, "default")
    assert torch.equal(model(x), before) and type(model.blocks[0]["attn"]) is kind


def test_a_bank_of_q_bias_and_v_bias():
    models = [shake(ek.inject(Beit(), EFFT, head="keep"), 0.1 + number / 5) for number in range(2)]
    check_bank(Beit, models, models, torch.randn(3, S, E))


def test_an_attention_that_multiplies_in_another_way_says_so():
    model = ek.inject(Beit("matmul"), EFFT, head="keep")
    with pytest.warns(UserWarning, match="did not call blocks.0.attn.qkv and 1 more adapted Linears"):
        model(torch.randn(B, S, E))
