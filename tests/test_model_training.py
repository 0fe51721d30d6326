"""What must keep working around an injected model: the ways people train, copy and store models."""

import copy
import io
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from models import DROPPED, PLAIN, adapted, assert_bits, assert_same, gradients, images, loss_of, shake, timm, vit
from refusals import refuses
from torch.utils.checkpoint import checkpoint

import efft_kernels as ek
from efft_kernels import passes


@pytest.mark.parametrize("config", [PLAIN, DROPPED], ids=["plain", "dropout"])
def test_two_runs_of_a_training_step_are_bit_equal(config):
    runs, model = [], adapted(config).train()
    x = images()
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(gradients(model, loss_of(model, x)))
    assert_bits(*runs)


def test_gradient_accumulation_adds_up():
    model, x = adapted().train(), images(4)
    whole = gradients(model, (loss_of(model, x[:2]) + loss_of(model, x[2:])) / 2)
    for part in (x[:2], x[2:]):
        (loss_of(model, part) / 2).backward()
    assert_same(gradients(model), whole)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "reversed"])
def test_two_forwards_before_two_backwards(order):
    model = adapted().train()
    x = images(2), images(2)
    want = gradients(model, loss_of(model, x[0]) + loss_of(model, x[1]))
    losses = [loss_of(model, part) for part in x]
    for i in order:
        losses[i].backward()
    assert_same(gradients(model), want)


def test_forward_features_and_single_blocks_train():
    model, x = adapted().train(), images()
    want = gradients(model, loss_of(model, x))
    loss = F.cross_entropy(model.forward_head(model.forward_features(x)), torch.arange(2))
    assert_same(gradients(model, loss), want)
    # one block called directly, backward before the next one is called
    tokens = torch.randn(2, 5, model.embed_dim)
    for block in model.blocks:
        tokens = block(tokens)
        tokens.square().sum().backward()
        tokens = tokens.detach()
    assert all(p.grad is not None for p in model.efft.parameters())


def test_dropout_is_drawn_anew_in_training_and_absent_in_eval():
    model, x = adapted(DROPPED), images()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), first)
    ek.updates(model)
    assert all(group.training for group in model.efft.groups())
    model.eval()
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)))


def test_dropout_keeps_the_mean_and_masks_factors():
    """The mean update of the first block's qkv over many masks is the update without dropout."""
    model, path = adapted(ek.EFFTConfig(rank=4, scale=2.0, factor_dropout=0.2)), "blocks.0.attn.qkv"
    group = model.efft["default"]["attn"]
    exact = torch.matmul(*group.eval().low_rank_pairs(path=path)[path][:2])
    group.train()
    draws = torch.stack([torch.matmul(*group.low_rank_pairs(path=path)[path][:2]) for _ in range(100)])
    spread = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() <= 6 * spread + 1e-6).all()
    down = group.low_rank_pairs(path=path)[path].down
    dropped = down == 0
    assert 0.1 < dropped.float().mean() < 0.3
    torch.testing.assert_close(down[~dropped], (group.u / 0.8)[~dropped])


def test_one_draw_per_attention_call_and_one_per_ffn_linear():
    model = adapted(DROPPED)
    model(images())  # which knows no masks
    model.train().efft.begin(model)
    pairs = model.efft._pass.pairs
    down = lambda path: pairs[path].down
    assert torch.equal(down("blocks.0.attn.qkv"), down("blocks.0.attn.proj"))
    assert not torch.equal(down("blocks.0.attn.qkv"), down("blocks.1.attn.qkv"))
    assert not torch.equal(down("blocks.0.mlp.fc1"), pairs["blocks.0.mlp.fc2"].up.T)
    model.efft.end(model, None)


def test_no_grad_and_inference_mode_agree_with_grad_mode():
    model, x = adapted(), images()
    want = model(x)
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(2):
            with mode():
                torch.testing.assert_close(model(x), want)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want)
    gradients(model, loss_of(model, x))


def test_a_forward_without_gradients_elsewhere_costs_none():
    """As in another thread that runs the model at the same time."""
    model, x = adapted(), images()
    run = lambda: gradients(model, model.forward_head(model.forward_features(x)).square().sum())
    want = run()
    with torch.no_grad():
        model.efft.begin(model)
    got = run()
    model.efft.end(model, None)
    assert_same(got, want)


def test_nothing_outlives_a_backward_or_a_broken_forward():
    model = adapted()
    loss_of(model, images()).backward()
    assert model.efft._replay == (-1, None) and not passes._replays
    model.efft.begin(model)  # without an end, as if KeyboardInterrupt had stopped the forward
    with ek.disable_adapter(model):
        plain = model(images())
    assert model.efft._pass is None and plain.isfinite().all()


def test_nothing_outlives_a_backward_that_failed():
    model, x = adapted(), images().requires_grad_()
    x.register_hook(lambda grad: 1 / 0)
    loss = loss_of(model, x)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    del loss
    assert not passes._replays


@pytest.mark.parametrize("config", [PLAIN, DROPPED], ids=["plain", "dropout"])
def test_two_threads_train_one_model(config):
    """A step in one thread during the forward of the other, and during its backward, which recomputes."""
    model = adapted(config, depth=3).train()
    model.set_grad_checkpointing(True)
    x = images(2), images(3)

    def step(i):
        torch.manual_seed(i)
        return gradients(model, loss_of(model, x[i]))

    def meanwhile(*args):
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: found.append(step(1)))
            other.start()
            other.join()

    want = step(0), step(1)
    found = []
    model.blocks[1].register_forward_pre_hook(meanwhile)
    assert_bits(step(0), want[0])
    assert len(found) == 2
    for got in found:
        assert_bits(got, want[1])
    assert not passes._replays


def _step(model, x, kind=torch.optim.AdamW, **options):
    optimizer = kind(ek.adapter_parameters(model), lr=0.1, **options)
    with torch.enable_grad():
        loss_of(model, x).backward()
    optimizer.step()


def _scaled_state(model):
    return {k: v * 1.5 if k.startswith("efft.") else v for k, v in model.state_dict().items()}


CHANGES = {
    "sgd": lambda model, x: _step(model, x, torch.optim.SGD),
    "adamw fused": lambda model, x: _step(model, x, fused=True),
    "adamw foreach": lambda model, x: _step(model, x, foreach=True),
    "load_state_dict": lambda model, x: model.load_state_dict(_scaled_state(model)),
    "load_state_dict assign": lambda model, x: model.load_state_dict(_scaled_state(model), assign=True),
    "in place": lambda model, x: [p.mul_(1.5) for p in model.efft.parameters()],
    "data replaced": lambda model, x: [setattr(p, "data", p.data * 1.5) for p in model.efft.parameters()],
    "through data": lambda model, x: [p.data.mul_(1.5) for p in model.efft.parameters()],
    "through numpy": lambda model, x: [p.detach().numpy().__imul__(1.5) for p in model.efft.parameters()],
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_stale_update_after(change):
    model, x = adapted(), images()
    with torch.no_grad():
        before = model(x)
        model(x)
        CHANGES[change](model, x)
        after, fresh = model(x), copy.deepcopy(model)
        fresh.efft._reset()
        assert not torch.equal(after, before) and torch.equal(after, fresh(x))


@pytest.mark.parametrize("config", [PLAIN, DROPPED], ids=["plain", "dropout"])
def test_non_reentrant_checkpointing(config):
    """The recomputation uses the factors and masks of its own forward, although another ran in between."""
    model = adapted(config, depth=3).train()
    x = images(2), images(2)

    def run(checkpointed):
        model.set_grad_checkpointing(checkpointed)
        torch.manual_seed(5)
        first, second = loss_of(model, x[0]), loss_of(model, x[1])
        return gradients(model, first + 2 * second)

    assert_bits(run(True), run(False))


def test_checkpointing_outside_the_forward_of_the_model():
    model = adapted(DROPPED, depth=3).train()
    tokens = torch.randn(2, 5, model.embed_dim)

    def run(call):
        torch.manual_seed(5)
        out = call(model.blocks[1], tokens)
        return torch.autograd.grad(out.square().sum(), list(model.efft.parameters()))

    plain = run(lambda block, t: block(t))
    again = run(lambda block, t: checkpoint(block, t, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


class Reentrant(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.blocks, self.head, self.on, self.reentrant = inner.blocks, inner.head, False, True

    def forward(self, tokens):
        for block in self.blocks:
            tokens = checkpoint(block, tokens, use_reentrant=self.reentrant) if self.on else block(tokens)
        return self.head(tokens.mean(1))


def test_reentrant_checkpointing_is_right_or_refused():
    tokens = torch.randn(2, 5, 192, requires_grad=True)
    model = shake(ek.inject(Reentrant(vit(depth=3)), PLAIN)).train()
    want = gradients(model, loss_of(model, tokens))
    model.on = True
    loss_of(model, tokens).backward()
    assert_same(gradients(model), want)

    ek.add_adapter(model, PLAIN, "other")
    ek.set_adapter(model, "default")
    for around in (nullcontext, lambda: ek.disable_adapter(model)):
        loss = loss_of(model, tokens)
        ek.set_adapter(model, "other")
        with around(), pytest.raises(RuntimeError, match="another adapter is active than in the forward"):
            loss.backward()
        ek.set_adapter(model, "default")

    with pytest.warns(UserWarning, match="the factors got no gradient: all .* requires grad"):
        loss_of(model, tokens.detach()).backward()
    model = shake(ek.inject(Reentrant(vit(depth=3)), DROPPED)).train()
    model.on = True
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss_of(model, tokens).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_without_an_adapter_is_recomputed_without(reentrant):
    tokens, dx = torch.randn(2, 5, 192, requires_grad=True), []
    model = shake(ek.inject(Reentrant(vit(depth=3)), PLAIN, head="keep"))
    model.reentrant = reentrant
    for model.on in (False, True):
        with ek.disable_adapter(model):
            y = model(tokens)
        model(tokens)  # with the adapter, in between
        dx.append(torch.autograd.grad(y.square().sum(), tokens)[0] if not reentrant else None)
        if reentrant:
            y.square().sum().backward()
            dx[-1], tokens.grad = tokens.grad, None
    assert torch.equal(*dx) and all(p.grad is None for p in model.efft.parameters())


def test_a_checkpoint_of_the_whole_model():
    model, x = adapted(), images().requires_grad_()
    ek.add_adapter(model, PLAIN, name="other")
    whole = lambda: checkpoint(model, x, use_reentrant=False).square().sum()
    want, loss = gradients(model, model(x).square().sum()), whole()
    assert_bits(gradients(model, loss), want)
    with ek.disable_adapter(model):
        without = whole()
    loss = whole()
    refused = lambda of: refuses(
        RuntimeError, "another adapter is active .* checkpoint the blocks instead", of.backward
    )
    refused(without)
    ek.set_adapter(model, "default")
    refused(loss)

    def two(x):  # a program that switches by itself
        ek.set_adapter(model, "default")
        first = model(x)
        ek.set_adapter(model, "other")
        return model(x + first.mean())

    want = gradients(model, two(x).square().sum())
    assert_bits(gradients(model, checkpoint(two, x, use_reentrant=False).square().sum()), want)
    seen = []
    handle = x.register_hook(lambda grad: seen.append(teacher()))

    @torch.no_grad()
    def teacher():
        with ek.disable_adapter(model):
            return model(x)

    model(x).square().sum().backward()
    handle.remove()
    assert torch.equal(seen[0], teacher())


def test_blocks_that_run_without_a_graph_first_are_no_reason_for_a_warning(recwarn):
    model = shake(ek.inject(Reentrant(vit(depth=2)), PLAIN))
    blocks = torch.nn.Sequential(*model.blocks)

    def recycle(tokens):
        with torch.no_grad():
            tokens = blocks(tokens)
        return model.head(blocks(tokens).mean(1))

    model.forward = recycle
    model(torch.randn(2, 5, 192)).square().sum().backward()
    assert all(p.grad is not None for p in model.efft.parameters())
    assert not [w for w in recwarn if "got no gradient" in str(w.message)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config", [PLAIN, DROPPED, ek.FacTConfig(), ek.LoRAConfig()], ids=["efft", "dropout", "fact", "lora"]
)
def test_autocast(dtype, config):
    model, x = adapted(config), images()
    want = model(x)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(model(x).float(), want, rtol=0.1, atol=0.1)
        with torch.no_grad():
            low = model(x)
        model.train()
        loss = loss_of(model, x)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model, loss).values())
    model.eval()
    with torch.no_grad():
        assert low.dtype == dtype
        torch.testing.assert_close(model(x), want)  # autocast leaves nothing behind


def test_grad_scaler():
    model, x = adapted().train(), images()
    want = gradients(model, loss_of(model, x))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(ek.adapter_parameters(model), lr=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, x)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert_same(gradients(model), want, rtol=0.3, atol=0.05)
    scaler.step(optimizer)


def test_to_another_dtype():
    model, x = adapted(), images()
    want = model(x)
    torch.testing.assert_close(model.double()(x.double()).float(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), want, rtol=0.1, atol=0.1)


def _pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, _pickled, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "save", "pickle"]
)
def test_copies_are_complete_and_independent(copied):
    model = adapted(DROPPED)
    ek.set_adapter(ek.add_adapter(model, PLAIN, "second"), "default")  # "second" waits for late gradients by hooks
    x = images()
    with torch.no_grad():
        model(x)
    loss_of(model, x)  # leaves a graph behind
    other = copied(model)
    assert torch.equal(other(x), model(x))
    assert {id(p) for p in other.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    shake(other)
    assert not torch.equal(other(x), model(x))
    want = model(x)
    ek.merge(other)
    ek.unmerge(other)
    assert torch.equal(model(x), want)
    other.train()
    loss_of(other, x).backward()
    assert all(p.grad is None for p in model.parameters())
    for name in ("default", "second"):
        ek.delete_adapter(other, name)
    assert not other._forward_pre_hooks and not other._forward_hooks


def test_ema_copy_follows():
    timm()
    from timm.utils import ModelEmaV3

    model = adapted().train()
    ema, x = ModelEmaV3(model, decay=0.5), images()
    with torch.no_grad():
        before = ema.module.eval()(x)
    shake(model, 0.5)
    ema.update(model)
    with torch.no_grad():
        after = ema.module(x)
    assert not torch.equal(before, after)
    fresh = copy.deepcopy(ema.module)
    assert torch.equal(fresh(x), after)


def test_state_dict_round_trip_and_unchanged_names():
    base = vit()
    names, model = list(base.state_dict()), adapted()
    state = model.state_dict()
    assert [n for n in state if not n.startswith("efft.")] == names
    other = ek.inject(vit(), PLAIN)
    other.load_state_dict(state)
    x = images()
    assert torch.equal(other(x), model(x))
    missing = model.load_state_dict(base.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(k.startswith("efft.") for k in missing.missing_keys)


def test_an_error_in_the_forward_leaves_nothing_behind():
    model = adapted()
    with pytest.raises((RuntimeError, AssertionError)):
        model(torch.randn(2, 4, 32, 32))
    assert model.efft._pass is None
    gradients(model, loss_of(model, images()))


def test_gradients_with_respect_to_the_images_of_a_frozen_adapter():
    model, x = adapted().requires_grad_(False), images().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x)
    merged = ek.merge(copy.deepcopy(model))
    torch.testing.assert_close(torch.autograd.grad(merged(x).square().sum(), x)[0], grad, rtol=1e-3, atol=1e-5)


def test_unfrozen_weights_and_biases_get_their_gradients():
    model = adapted()
    model.requires_grad_(True)
    grads = gradients(model, loss_of(model, images()))
    assert all(g.isfinite().all() for g in grads.values())
    assert grads["blocks.0.attn.qkv.weight"].abs().max() > 0 and grads["blocks.0.mlp.fc2.bias"].abs().max() > 0


def test_functional_call_with_other_factors():
    model, x = adapted(), images()
    factors = {name: p.detach() * 1.5 for name, p in model.named_parameters() if name.startswith("efft.")}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(factors.get(name, p))
        model(x)
        assert torch.equal(torch.func.functional_call(model, factors, x), other(x))
