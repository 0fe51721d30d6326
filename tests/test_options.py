"""Options of the methods that other papers brought: released starts, rank-1 terms, output channels, rsLoRA's scale."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from models import METHODS, adapted, gradients, images, loss_of, shake, swin, timm, vit
from torch import nn

import efft_kernels as ek
from efft_kernels.groups import make_group
from efft_kernels.serving import AdapterBank

SEVERAL = ["efft1", "efft2", "efft2-shared", "fact-tt", "fact-tk", "lora", "lora-all", "lora-xs"]


def with_(method, **options):
    return dataclasses.replace(METHODS[method], **options)


def updates(model, training=False) -> dict:
    """path -> down @ up of every Linear, float64"""
    found = {}
    for group in model.efft["default"].train(training).values():
        for path, (down, up, *_) in group.low_rank_pairs().items():
            found[path] = down.detach().double() @ up.detach().double()
    return found


def rms(t):
    return t.double().square().mean().sqrt().item()


def released_products(method, r, d=768):
    """name -> what multiplies the zero factor, as the released codes start it (PETL-ViT, the code of EFFT, loralib)"""
    if method.startswith("efft"):
        u1, c1 = nn.init.xavier_uniform_(torch.empty(d, r)), nn.init.xavier_uniform_(torch.empty(r, r, 4))
        u2, c2 = nn.init.xavier_uniform_(torch.empty(d, r)), nn.init.xavier_uniform_(torch.empty(r, r, 2))
        return {
            "attn": torch.cat([u1 @ c1[..., i] for i in range(4)]),
            "ffn": torch.cat([u2 @ c2[..., i] for i in range(2)]),
        }
    if method == "lora":
        a = nn.Parameter(torch.empty(8 * r, d))
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        return {"q": a}
    u = nn.Linear(d, r, bias=False).weight.T
    if method == "fact-tt":
        q, fc1, fc2 = (nn.Linear(*shape, bias=False).weight.T for shape in ((r, r), (r, 4 * r), (4 * r, r)))
        return {"q": u @ q, "fc1": u @ fc1, "fc2": torch.cat([u @ part for part in fc2.split(r)])}
    c, p = nn.init.xavier_uniform_(torch.empty(r, r, r)), nn.init.xavier_uniform_(torch.empty(r, 144))
    return {"q": torch.cat([u @ core for core in (c @ p).permute(2, 0, 1)])}


def library_products(method, r, init):
    with torch.device("meta"):
        model = timm().create_model("vit_base_patch16_224")
    more = {"efft2": {"zero_init": "v"}, "lora": {"targets": ("q",)}}.get(method, {})
    config = with_(method, rank=r, init=init, **more)
    made = ek.plan(model, config)
    groups = {s.name: make_group(s, config, {slot.site.path: torch.empty(0) for slot in s.slots}) for s in made.groups}
    if method == "efft2":
        return {name: torch.cat([g.u @ core for core in g.sigma]) for name, g in groups.items()}
    (group,) = groups.values()
    if method == "lora":
        return {"q": group.a}
    sigma, found = group.cores(), {}
    if method == "fact-tk":
        return {"q": torch.cat([group.u @ core for core in sigma])}
    for name in ("q", "fc1", "fc2"):
        cores = [core for slot in group.spec.slots if name in slot.site.parts for core in slot.cores]
        found[name] = torch.cat([group.u @ sigma[core] for core in cores])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, rank, ratios",
    [
        ("efft2", 16, {"attn": 2.0, "ffn": 2**0.5}), ("fact-tt", 16, {"q": 4.2, "fc1": 4.2, "fc2": 8.4}),
        ("fact-tk", 16, {"q": 9.7}), ("fact-tk", 8, {"q": 6.9}), ("lora", 8, {"q": 2.43}),
    ],
)  # fmt: skip
def test_released_starts_have_the_size_of_the_released_codes(method, rank, ratios):
    """the speed of an update is its scale times the rms of what multiplies the zero factor"""
    torch.manual_seed(0)
    # small tensors scatter, so a mean of many draws
    mean = lambda draws, name: rms(torch.tensor([rms(draw[name].detach()) for draw in draws]))
    released = [released_products(method, rank) for _ in range(20)]
    for init, ratio in (("released", dict.fromkeys(ratios, 1.0)), ("xavier", ratios)):
        draws = [library_products(method, rank, init) for _ in range(5 if method == "fact-tk" else 1)]
        for name in ratios:
            assert mean(draws, name) / mean(released, name) == pytest.approx(ratio[name], rel=0.08), (init, name)


def test_released_cores_of_a_swin_are_those_of_its_code():
    """[4, r, r] for the attention of a stage, [blocks, r1, r2] for its FFN"""
    model = ek.inject(swin(), ek.EFFTConfig(rank=8, init="released"))
    groups = model.efft["default"]
    for name, shape in {"stage0_attn": (4, 4, 4), "stage0_ffn": (2, 2, 4), "stage1_ffn": (1, 4, 8)}.items():
        bound = nn.init.xavier_uniform_(torch.empty(shape)).abs().max().item()
        fans = nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))
        exact = (6 / sum(fans)) ** 0.5
        assert bound <= exact and 0.7 * exact < groups[name].sigma.abs().max() <= exact, name


@pytest.mark.parametrize("method", ["efft1", "efft2", "fact-tt", "fact-tk", "lora"])
def test_a_released_start_is_a_start(method):
    model = ek.inject(vit(), with_(method, init="released"))
    assert not any(update.any() for update in updates(model).values())
    for group in model.efft["default"].values():
        zeros = {name for name, p in group.named_parameters() if not p.any()}
        assert zeros == set(group.starts_at_zero) != set()


def count(method, depth=2, **options):
    with torch.device("meta"):
        model = timm().create_model("vit_base_patch16_224", depth=depth)
    return ek.plan(model, with_(method, **options)).parameters


def test_options_cost_what_they_say():
    d, L = 768, 2
    outputs = L * (4 * d + 4 * d + d)  # q, k, v, o, fc1, fc2
    for method, cores in (("efft1", 3 * L), ("efft2-shared", 6), ("fact-tt", 12 * L), ("fact-tk", 12 * L)):
        plain = count(method)
        assert count(method, rank_weights=True) == plain + 4 * cores
        assert count(method, channel_scale=True) == count(method, dora=True) == plain + outputs
    assert count("efft2", rank_weights=True) == count("efft2") + 6 * 6 * L  # the larger of the ranks 4 and 6
    for method, matrices, width in (("lora", 2 * L, 2 * d * L), ("lora-xs", 3 * L, (2 * d + 4 * d) * L)):
        assert count(method, rank_weights=True) == count(method) + 4 * matrices
        assert count(method, channel_scale=True) == count(method, dora=True) == count(method) + width
    for method in ("efft2", "lora", "vera"):
        assert count(method, rank_dropout=0.5, rank_stabilized=True) == count(method)


@pytest.mark.parametrize("method", [*SEVERAL, "vera"])
def test_dropping_rank_1_terms(method):
    """a mask per matrix and forward: terms are dropped whole, and those that stay are scaled up"""
    model = adapted(with_(method, rank_dropout=0.5, targets=("q", "v"), blocks=(0,)), embed_dim=48).double()
    whole, path = updates(model), "blocks.0.attn.qkv"
    assert list(whole) == [path]
    torch.manual_seed(1)
    draws = [updates(model, training=True)[path] for _ in range(200)]
    width = whole[path].shape[1] // 3
    ranks = [torch.linalg.matrix_rank(t[:, :width]).item() for t in (whole[path], *draws[:20])]
    assert min(ranks[1:]) < ranks[0] and max(ranks[1:]) <= ranks[0] and not torch.equal(draws[0], draws[1])
    assert rms(sum(draws) / len(draws) - whole[path]) < 0.15 * rms(whole[path])
    for path, want in updates(model).items():
        assert torch.equal(want, whole[path]), "nothing is dropped in evaluation"


def test_a_dropped_term_gets_no_gradient_and_a_seed_repeats():
    model = shake(ek.inject(vit(), with_("lora", rank_dropout=0.5, rank_weights=True))).train()
    found, x = [], images()
    for _ in range(2):
        torch.manual_seed(5)
        found.append(gradients(model, loss_of(model, x)))
    assert found[0].keys() == found[1].keys() and all(torch.equal(t, found[1][k]) for k, t in found[0].items())
    zeros = {key: (t == 0) for key, t in found[0].items() if key.endswith("rank_weights")}
    (dropped,) = zeros.values()
    assert 0 < dropped.sum() < dropped.numel()
    (b,) = (t for key, t in found[0].items() if key.endswith(".b"))
    assert torch.equal((b == 0).all(-1), dropped)


@pytest.mark.parametrize("method", ["efft1", "efft2", "fact-tt", "lora", "lora-xs", "vera", "efft2-options"])
def test_two_learning_rates(method):
    """LoRA+: the factors that start at zero have the larger rate; each parameter is in one group"""
    model = ek.inject(vit(), METHODS[method])
    zero = {id(p) for p in model.efft.parameters() if not p.any()}
    first, second = ek.adapter_parameter_groups(model, lr=1e-3, ratio=8)
    assert {id(p) for p in second["params"]} == zero and (first["lr"], second["lr"]) == (1e-3, 8e-3)
    together = [*first["params"], *second["params"]]
    assert {id(p) for p in together} == {id(p) for p in ek.adapter_parameters(model)}
    before, optimizer = [p.detach().clone() for p in together], torch.optim.SGD([first, second])
    loss_of(model, images()).backward()
    grads = [p.grad.clone() for p in together]
    optimizer.step()
    for p, old, grad in zip(together, before, grads):
        torch.testing.assert_close(p.detach(), old - (8e-3 if id(p) in zero else 1e-3) * grad)
    model.efft.requires_grad_(False)
    first, second = ek.adapter_parameter_groups(model, lr=1.0)
    assert first["params"] == [*model.head.parameters()] and second == {"params": [], "lr": 16.0}
    for options in ({"lr": 0}, {"lr": 1e-3, "ratio": float("inf")}, {"lr": 1e200, "ratio": 1e200}):
        with pytest.raises(ValueError, match="must be a finite number above 0"):
            ek.adapter_parameter_groups(model, **options)


@pytest.mark.parametrize("method", ["efft2", "lora"])
def test_adapters_with_and_without_options_share_a_batch(method):
    """in a bank, what an adapter does not have counts as ones"""
    torch.manual_seed(0)
    plain = vit().double()
    base_of = functools.partial(copy.deepcopy, copy.deepcopy(plain))
    bank, x, want = AdapterBank(plain), images(5, dtype=torch.float64), []
    lower = with_(method, channel_scale=True, rank_stabilized=True, rank=2 if method == "lora" else (2, 3))
    configs = [METHODS[method], with_(method, rank_weights=True), lower, with_(method, dora=True)]
    for i, config in enumerate(configs):
        model = shake(ek.inject(base_of(), config, head="keep"), 0.2)
        bank.add(str(i), model)
        want.append(model(x)[i])
    want.append(plain(x)[4])
    with torch.no_grad(), bank.use(["0", "1", "2", "3", None]):
        torch.testing.assert_close(plain(x), torch.stack(want))
    with torch.no_grad(), bank.use(["3"]):
        torch.testing.assert_close(plain(x[3:4]), want[3][None])
    bank.add("dropped", ek.inject(base_of(), with_(method, rank_dropout=0.5), head="keep"))
    plain.train()
    with pytest.raises(ValueError, match=r"must have the same rank_dropout, got \[0.0, 0.5\]"):
        with bank.use(["0", "dropped"]):
            pass
