"""AdapterBank: mixed batches equal one forward per adapter, adapters can be added and removed, bad input is refused."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from models import METHODS, PLAIN, biased, images, shake, swin, timm, vit
from refusals import refuses
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import efft_kernels as ek
from efft_kernels.layouts import classifiers_of
from efft_kernels.ops import dispatch
from efft_kernels.serving import AdapterBank

BATCH = ["a", None, "b", "a", "c", None]


def bare(make=vit, **options):
    torch.manual_seed(0)
    return biased(make(**options))


def trained(config=PLAIN, make=vit, head="train", seed=1, dtype=torch.float32, **options):
    """A model like ``bare``, injected, with random factors and a head that differs from the base's."""
    model = ek.inject(bare(make, **options), config, head=head)
    torch.manual_seed(seed)
    shake(model, 0.1)
    with torch.no_grad():
        for _, linear in classifiers_of(model):
            linear.weight.add_(torch.randn_like(linear.weight) * 0.05 * linear.weight.requires_grad)
    return model.to(dtype)


def filled(config=PLAIN, make=vit, dtype=torch.float32, classes=(10, 3, 7), **options):
    """(a bank of three adapters, {name: the injected model that each was copied from, None: the base})"""
    models = {name: trained(config, make, head, i, dtype) for i, (name, head) in enumerate(zip("abc", classes))}
    bank = AdapterBank(bare(make).to(dtype), **options)
    for name, model in models.items():
        bank.add(name, model)
    return bank, {**models, None: bare(make).to(dtype)}


def one_by_one(models, ids, x):
    """Logits of each sample from the model of its adapter, padded with -inf to the largest number of classes."""
    rows = [models[name](x[i : i + 1]) for i, name in enumerate(ids)]
    width = max(row.shape[1] for row in rows)
    return torch.cat([F.pad(row, (0, width - row.shape[1]), value=float("-inf")) for row in rows])


@pytest.mark.parametrize("make", [vit, swin])
@pytest.mark.parametrize("method", METHODS)
def test_mixed_batch_equals_one_forward_per_adapter(make, method):
    bank, models = filled(METHODS[method], make, torch.float64)
    x = images(6, torch.float64)
    with bank.use(BATCH), torch.no_grad():
        y = bank.model(x)
    want = one_by_one(models, BATCH, x)
    assert y.shape == (6, 10) and (y.isinf() == want.isinf()).all() and y[2].isinf().sum() == 7
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    assert torch.equal(bank.model(x), models[None](x))  # outside of use, the base model


@pytest.mark.parametrize("make", [vit, swin])
@pytest.mark.parametrize("method", ["efft1", "efft2-scale", "fact-tk", "lora-all", "vera", "lora-dora", "efft2-dora"])
def test_gradients_equal_those_of_one_forward_per_adapter(make, method):
    bank, models = filled(METHODS[method], make, torch.float64, classes=(3, 7, 3))
    x, target = images(6, torch.float64), torch.tensor([0, 1, 2, 1, 0, 2])
    with bank.use(BATCH):
        got = F.cross_entropy(bank.model(x), target)
    want = F.cross_entropy(one_by_one(models, BATCH, x), target)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    got.backward()  # after use has ended
    want.backward()
    for name in "abc":
        ours, theirs = bank.parameters(name), ek.adapter_parameters(models[name])
        assert len(ours) == len(theirs)
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in bank.model.parameters())


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_every_backend(backend):
    if not next(b for b in ek.backends() if b.name == backend).available:
        pytest.skip(f"{backend} is not available here")
    module = dispatch.load(backend)[0]
    few = torch.zeros(1, 1), torch.zeros(1, 1), None, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1)
    if reason := module.unsupported("mixed_linear", *few):
        pytest.skip(reason)
    # small, because Triton's interpreter is slow
    bank, models = filled(make=lambda **options: vit(depth=1, num_heads=2, embed_dim=64, **options), backend=backend)
    x = images(6)
    with bank.use(BATCH):
        y = bank.model(x)
    finite = y.isfinite()
    torch.testing.assert_close(y, one_by_one(models, BATCH, x), rtol=1e-3, atol=1e-4)
    y[finite].square().sum().backward()
    assert all(p.grad.isfinite().all() for name in "abc" for p in bank.parameters(name))


def test_ranks_and_scales_may_differ():
    configs = [PLAIN, ek.EFFTConfig(rank=(2, 7), scale=0.5, factor_dropout=0.0, zero_init="u")]
    models = {name: trained(c, seed=i, dtype=torch.float64) for i, (name, c) in enumerate(zip("ab", configs))}
    bank = AdapterBank(bare().double())
    for name, model in models.items():
        bank.add(name, model)
    x = images(3, torch.float64)
    with bank.use(["b", "a", "b"]), torch.no_grad():
        torch.testing.assert_close(bank.model(x), one_by_one(models, ["b", "a", "b"], x), rtol=1e-10, atol=1e-10)


def transformer(**options):
    transformers = pytest.importorskip("transformers")
    timm()  # transformers imports torchvision, which timm() makes importable
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, patch_size=16)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, num_labels=10)).eval()


def test_a_model_of_transformers():
    bank, models = filled(make=transformer, dtype=torch.float64, classes=(3, 7, 3))
    x, target = images(6, torch.float64), torch.tensor([0, 1, 2, 1, 0, 2])
    with bank.use(BATCH):
        out = bank.model(pixel_values=x, labels=target)  # keyword arguments; the model computes the loss
    want = one_by_one({name: lambda t, m=model: m(t).logits for name, model in models.items()}, BATCH, x)
    torch.testing.assert_close(out.logits, want, rtol=1e-9, atol=1e-10)
    out.loss.backward()
    F.cross_entropy(want, target).backward()
    for name in "abc":
        for p, q in zip(bank.parameters(name), ek.adapter_parameters(models[name])):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="each of the 5 samples, got 6"), bank.use(BATCH):
        bank.model(pixel_values=x[:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_16_bits(dtype):
    bank, models = filled(dtype=dtype)
    x, trained = images(6, dtype), [p for name in "abc" for p in bank.parameters(name)]
    assert {p.dtype for p in trained} == {torch.float32, dtype}, "factors, and heads as the model's"
    with bank.use(BATCH):
        y = bank.model(x)
    exact = one_by_one({name: copy.deepcopy(model).double() for name, model in models.items()}, BATCH, x.double())
    finite = exact.isfinite()
    with torch.no_grad():
        plain = one_by_one(models, BATCH, x)
    ours, theirs = ((t.double() - exact)[finite].norm() for t in (y, plain))
    assert y.dtype == dtype and ours < 2 * theirs, (ours, theirs)
    y[finite].float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in trained)


def test_batches_with_one_adapter_or_none():
    bank, models = filled(METHODS["efft2-part"])
    x = images(2)
    for ids in (["b", "b"], [None, None], [None, "c"], [None, "lora"], ["efft2", None], ["a", "b"]):
        for name in {*ids} & {"lora", "efft2"}:  # of another method, for more Linears
            bank.add(name, models.setdefault(name, trained(METHODS[name])))
        with bank.use(ids), torch.no_grad():
            y = bank.model(x)
            # also by layers that are called outside of the model's forward
            torch.testing.assert_close(bank.model.forward_head(bank.model.forward_features(x)), y)
        torch.testing.assert_close(y, one_by_one(models, ids, x), rtol=1e-4, atol=1e-5)
    with bank.use([]), torch.no_grad():
        assert bank.model(x[:0]).shape == (0, 10)


def test_bits_are_reproducible_and_a_diverged_adapter_affects_only_its_samples():
    bank, _ = filled()
    x = images(6)

    def run():
        with bank.use(BATCH):
            y = bank.model(x)
        own = bank.parameters("a") + bank.parameters("c")
        return y.detach(), torch.autograd.grad(y[~y.isinf()].square().sum(), own)

    clean, grads = run()
    again, same = run()
    assert torch.equal(clean, again) and all(torch.equal(a, b) for a, b in zip(grads, same))
    with torch.no_grad():
        for p in bank.parameters("b"):
            p.fill_(float("nan"))
    dirty, after = run()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(clean[others], dirty[others]) and dirty[2, :3].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(grads, after))


def test_grad_modes_and_autocast():
    bank, models = filled(make=swin)
    x = images(6)
    want = one_by_one(models, BATCH, x)
    for context in (torch.no_grad(), torch.inference_mode()):
        with bank.use(BATCH):
            with context:
                y = bank.model(x)
            trained = bank.model(x)  # must not reuse tensors of inference
        assert not y.requires_grad
        torch.testing.assert_close(y, want, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(trained, want, rtol=1e-3, atol=1e-4)
        grads = torch.autograd.grad(trained[want.isfinite()].square().sum(), bank.parameters("b"))
        assert all(grad.any() for grad in grads)
    with bank.use(BATCH), torch.autocast("cpu", torch.bfloat16):
        y = bank.model(x)
    assert y.dtype == torch.bfloat16
    finite = want.isfinite()
    assert (y.float() - want)[finite].norm() < 0.05 * want[finite].norm()
    y.float()[finite].sum().backward()
    assert all(p.grad is not None for name in "abc" for p in bank.parameters(name))


def test_gradients_accumulate_over_batches():
    bank, _ = filled(classes=(3, 3, 3))
    x, parts = images(6), (slice(0, 2), slice(2, 6))
    parameters = [p for name in "abc" for p in bank.parameters(name)]

    def loss(rows):
        with bank.use(BATCH[rows]):
            return bank.model(x[rows]).square().sum()

    want = torch.autograd.grad(loss(slice(0, 6)), parameters)
    for rows in parts:
        loss(rows).backward()
    accumulated = [p.grad for p in parameters]
    both = torch.autograd.grad(sum(loss(rows) for rows in parts), parameters)  # one backward through two uses
    for got in (accumulated, both):
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_several_uses_and_a_failing_backward(reentrant):
    bank, _ = filled(classes=(10, 10, 10))
    x = images(2).requires_grad_()  # reentrant checkpointing needs an input that requires grad
    parameters = [p for name in "abc" for p in bank.parameters(name)]

    def run():
        total = 0
        for ids in (["a", "b"], ["c", None], ["b", "c"]):
            with bank.use(ids):
                total = total + bank.model(x).square().sum()
        with bank.use(["b"]):  # backward runs within another use
            total.backward()
        grads = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        return grads

    want, inner = run(), bank.model.blocks[0]
    forward = inner.forward
    inner.forward = lambda t: torch.utils.checkpoint.checkpoint(forward, t, use_reentrant=reentrant)
    for g, w in zip(run(), want):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    x.grad, y = None, bank.model(x)  # outside of every use, and so recomputed

    def mixed():  # a use within the backward
        with bank.use(["a", "b"]):
            return bank.model(x)

    with bank.use(["a", "b"]):
        want, seen = bank.model(x), []
        x.register_hook(lambda grad: seen.append(mixed()))
        y.square().sum().backward()
    inner.forward, got = forward, x.grad
    torch.testing.assert_close(seen[0], want)
    torch.testing.assert_close(got, torch.autograd.grad(bank.model(x).square().sum(), x)[0])
    assert not bank._replays and not bank._plain.outer and all(p.grad is None for p in parameters)
    inner.forward = lambda t: torch.utils.checkpoint.checkpoint(forward, t, use_reentrant=reentrant)

    handle = parameters[0].register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    handle.remove()
    assert not bank._replays  # otherwise they keep the graph alive


@pytest.mark.slow
def test_compiled_with_graph_breaks():
    bank, _ = filled()
    x = images(6)
    torch._dynamo.reset()
    compiled = torch.compile(bank.model, backend="aot_eager")
    for ids in (BATCH, ["c", "a", None] * 2):
        with bank.use(ids), torch.no_grad():
            torch.testing.assert_close(compiled(x), bank.model(x), rtol=1e-4, atol=1e-5)


def test_dropout_while_training():
    config = ek.EFFTConfig(rank=4, factor_dropout=0.3)
    bank, _ = filled(config)
    bank.model.train()
    x = images(6)
    with bank.use(BATCH):
        assert not torch.equal(bank.model(x), bank.model(x))
    fact, models = filled(ek.FacTConfig(rank=4, activation_dropout=0.3), classes=(3, 3, 3))
    fact.model.train()
    with fact.use(BATCH):
        y = fact.model(x)
        assert not torch.equal(fact.model(x)[0], y[0])
    torch.testing.assert_close(y[[1, 5]], models[None](x)[[1, 5]], rtol=1e-4, atol=1e-5)  # samples without an adapter
    y[[0, 2, 3, 4], :3].sum().backward()
    assert all(p.grad.any() for name in "abc" for p in fact.parameters(name))
    for each in (bank, fact):
        each.model.eval()
        with each.use(BATCH):
            assert torch.equal(each.model(x), each.model(x))
    bank.add("d", trained(ek.EFFTConfig(rank=4, factor_dropout=0.0), seed=9))
    for name, dropout in (("e", 0.0), ("f", 0.3)):
        bank.add(name, trained(ek.LoRAConfig(rank=4, rank_dropout=dropout)))
        bank.add(name.upper(), trained(ek.FacTConfig(rank=4, activation_dropout=dropout)))
    for ids, option in (("ad", "factor_dropout"), ("ef", "rank_dropout"), ("EF", "activation_dropout")):
        bank.model.eval()  # where they may differ
        with bank.use([*ids]), torch.no_grad():
            bank.model(x[:2])
        bank.model.train()
        with pytest.raises(ValueError, match=rf"must have the same {option}, got \[0.0, 0.3\]"), bank.use([*ids]):
            pass


def test_copies_and_pickles_are_independent_banks():
    bank, _ = filled()
    x = images(6)
    with bank.use(BATCH), torch.no_grad():
        want = bank.model(x)
    for other in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank)), copy.deepcopy(bank.model).efft):
        model = other.model
        assert other.names == ["a", "b", "c"] and model is not bank.model and model.efft is other
        with other.use(BATCH), torch.no_grad():
            assert torch.equal(model(x), want)
        other.remove("a")
    assert len(bank) == 3


def test_release_restores_the_model():
    model = bare()
    model.patch_embed.requires_grad_(False)
    requires_grad = {key: p.requires_grad for key, p in model.named_parameters()}
    state, bank = {key: t.clone() for key, t in model.state_dict().items()}, AdapterBank(model)
    bank.add("a", trained())
    assert model.state_dict().keys() == state.keys() and not any(p.requires_grad for p in model.parameters())
    twin = copy.deepcopy(bank)
    for released in (twin, bank):
        released.release()
        released.release()
        with pytest.raises(RuntimeError, match="has released its model"), released.use(["a"]):
            pytest.fail("entered")
        refuses(RuntimeError, "has released its model", released.add, "b", trained())
    assert not hasattr(twin.model, "efft")
    assert {key: p.requires_grad for key, p in model.named_parameters()} == requires_grad
    assert not hasattr(model, "efft")
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    assert not model._forward_pre_hooks and not model._forward_hooks
    ek.inject(model, PLAIN)


def test_a_model_without_one_of_its_blocks():
    bank, model = filled()[0], ek.add_adapter(trained(ek.LoRAConfig(rank=2, blocks=(0,))), PLAIN, "for both")
    merged = ek.merge(ek.set_adapter(model, "default"))
    bank.model.blocks, merged.blocks = bank.model.blocks[:1], merged.blocks[:1]
    bank.release()
    assert {type(m) for m in bank.model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    refuses(ValueError, "blocks.1.attn.qkv must be the nn.Linear that merge left there, got None", ek.unmerge, merged)


def test_names_classes_and_bytes(tmp_path):
    bank, models = filled()
    assert bank.names == ["a", "b", "c"] and "b" in bank and "d" not in bank and None not in bank and len(bank) == 3
    assert [bank.classes(name) for name in (*"abc", None)] == [10, 3, 7, 10]
    factors = sum(p.numel() for p in models["b"].efft.parameters())
    assert bank.bytes("b") == 4 * (factors + 3 * 192 + 3) and bank.bytes() == sum(bank.bytes(n) for n in bank.names)
    bank.remove("b")
    assert bank.names == ["a", "c"] and bank.bytes() == bank.bytes("a") + bank.bytes("c")
    ek.save_adapter(trained(head="keep"), tmp_path / "headless")
    bank.add("plain", tmp_path / "headless")
    assert bank.classes("plain") == 10 and bank.bytes("plain") == 4 * factors
    assert bank.parameters("plain") == list(bank._adapters["plain"].groups.parameters())
    for method in ("vera", "lora-xs"):  # which have buffers
        bank.add(method, model := trained(METHODS[method]))
        state = *model.efft["default"].state_dict().values(), *model.head.parameters()
        assert bank.bytes(method) == sum(t.nbytes for t in state)


def test_an_adapter_that_another_thread_adds_meanwhile_stays(monkeypatch):
    bank, model = AdapterBank(bare()), trained()
    one, other = bank.read(model), bank.read(model)
    monkeypatch.setattr(bank, "read", lambda *_, **__: bank.add("a", other) or one)
    refuses(ValueError, "already has an adapter 'a'", bank.add, "a", model)
    assert bank._adapters["a"] is other


@pytest.mark.parametrize("make", [vit, swin])
def test_add_and_save_files(make, tmp_path):
    model = trained(make=make, head=3)
    ek.save_adapter(model, tmp_path / "file", multilabel=True, base_model="own")
    bank = AdapterBank(bare(make))
    bank.add("a", tmp_path / "file")
    bank.add("same", model)
    bank.save("a", tmp_path / "again")
    loaded = ek.load_adapter(bare(make), str(tmp_path / "again"))
    bank.add("loaded", loaded)
    assert ek.read_adapter(tmp_path / "again").base_model == "own"
    assert loaded.efft["default"].multilabel and bank.multilabel("loaded") and not bank.multilabel("same")
    x = images(2)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        with bank.use(["a", "same"]):
            y = bank.model(torch.cat([x[:1]] * 2))
    assert torch.equal(y[0], y[1])
    # the bank has a copy: training the model further does not change it
    for p in model.parameters():
        p.data.fill_(1.0)
    with bank.use(["a", "same"]), torch.no_grad():
        assert torch.equal(bank.model(torch.cat([x[:1]] * 2)), y)


def test_adapters_added_and_removed_while_others_compute():
    bank, models = filled()
    x, ids = images(3), ["a", None, "b"]
    with torch.no_grad():
        want = one_by_one(models, ids, x)
    wrong, stop = [], threading.Event()

    def compute():
        torch.set_num_threads(1)
        while not stop.is_set():
            with bank.use(ids), torch.no_grad():
                y = bank.model(x)
            if not torch.allclose(y, want, rtol=1e-3, atol=1e-4):
                wrong.append(y)

    workers = [threading.Thread(target=compute) for _ in range(3)]
    for worker in workers:
        worker.start()
    extra = trained(seed=5)
    for i in range(30):
        bank.add(f"extra{i}", extra)
        if i % 2:
            bank.remove(f"extra{i}")
    with bank.use(["c", "extra0", "c"]), torch.no_grad():
        bank.remove("c")  # this use keeps it
        y = bank.model(x)
        with pytest.raises(ValueError, match="got 'c'"), bank.use(["c"]):
            pass
    stop.set()
    for worker in workers:
        worker.join()
    assert not wrong and len(bank) == 2 + 15
    want = one_by_one({**models, "extra0": extra}, ["c", "extra0", "c"], x)
    torch.testing.assert_close(y, want, rtol=1e-3, atol=1e-4)


def test_each_asyncio_task_has_its_own_use():
    bank, models = filled()
    x = images(2)

    async def one(ids):
        with bank.use(ids):
            await asyncio.sleep(0)  # the other tasks enter their uses
            here = bank.model(x)
            return here, await asyncio.to_thread(bank.model, x)

    async def run():
        batches = ["a", "b"], ["c", None], ["b", "a"]
        with torch.no_grad():
            return zip(batches, await asyncio.gather(*map(one, batches)))

    with torch.no_grad():
        for ids, answers in asyncio.run(run()):
            for y in answers:
                torch.testing.assert_close(y, one_by_one(models, ids, x), rtol=1e-4, atol=1e-5)


def test_generators_may_leave_their_uses_in_any_order():
    bank, models = filled(classes=(3, 3, 3))
    x = images(1)

    def under(name):
        with bank.use([name]):
            yield

    with torch.no_grad():
        first, second = under("a"), under("b")
        next(first), next(second)
        first.close()  # the second use stays active
        torch.testing.assert_close(bank.model(x), models["b"](x), rtol=1e-4, atol=1e-5)
        second.close()
        assert torch.equal(bank.model(x), models[None](x))  # no use is left

    async def leave(generator):
        await generator.aclose()

    async def run():
        async def under(name):
            with bank.use([name]):
                yield

        generator = under("a")
        await anext(generator)
        await asyncio.create_task(leave(generator))  # as an event loop closes an unfinished one

    asyncio.run(run())


def test_an_error_within_a_use_ends_it():
    bank, models = filled(classes=(3, 3, 3))
    x = images(1)

    handle = bank.model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    bank.model.train()
    with pytest.raises(ZeroDivisionError), bank.use(["a", None]):
        bank.model(images(2))
    assert bank.model.blocks[1].training  # although the search for the samples has failed
    bank.model.eval()
    handle.remove()
    with torch.no_grad():
        assert torch.equal(bank.model(x), models[None](x))
        with bank.use(["b"]):
            torch.testing.assert_close(bank.model(x), models["b"](x), rtol=1e-4, atol=1e-5)


def test_uses_of_two_banks_and_within_another():
    (one, models), (two, others) = filled(classes=(3, 3, 3)), filled(METHODS["lora"], classes=(3, 3, 3))
    x = images(1)
    with torch.no_grad(), one.use(["a"]), two.use(["c"]):
        torch.testing.assert_close(two.model(x), others["c"](x), rtol=1e-4, atol=1e-5)
        with one.use(["b"]):  # replaces the outer one
            torch.testing.assert_close(one.model(x), models["b"](x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.model(x), models["a"](x), rtol=1e-4, atol=1e-5)


def test_bad_ids_are_refused_before_any_compute(monkeypatch):
    bank, _ = filled()
    bank.add("l", trained(METHODS["lora"]))
    for ids, error, says in [
        (["a", "l", "b"], ValueError, "of one method, for the same Linears, got 'b', 'l', which differ"),
        (["a", "x"], ValueError, "name must be one of the bank's adapters, 'a', 'b', 'c', 'l', got 'x'"),
        (["a", 1], ValueError, "got 1"),
        (["a", ["b"]], ValueError, r"got \['b'\]"),
        ("ab", TypeError, "ids must be a sequence with a name or None for each sample, got str"),
        (None, TypeError, "got NoneType"),
        ({"a": 1}, TypeError, "got dict"),
    ]:
        with pytest.raises(error, match=says), bank.use(ids):
            pytest.fail("entered")
    monkeypatch.setattr(bank.model, "patch_embed", None)  # must not be reached
    for x in (images(3), images(1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="ids must name an adapter for each of the . samples, got 2"):
            with bank.use(["a", None]):
                bank.model(x)


def reordered(order, back):
    """A model whose first MLP has its tokens [B, 5, 192] in another order, and which takes integers too."""

    def make(**options):
        model = vit(**options)
        forward = model.blocks[0].mlp.forward
        model.blocks[0].mlp.forward = lambda x: back(forward(order(x)), x)
        whole = model.forward
        model.forward = lambda x: whole(x.float())
        return model

    return make


@pytest.mark.parametrize("method", ["efft2", "efft2-dora"])
def test_samples_along_the_second_dimension(method):
    make = reordered(lambda x: x.transpose(0, 1), lambda y, _: y.transpose(0, 1))
    bank, models = filled(METHODS[method], make)
    with bank.use([*"ababa"]), torch.no_grad(), pytest.warns(UserWarning, match=r"gets \[5, 5, 192\], and nothing"):
        bank.model(images(5).int())  # a later forward shows more
    for ids in (["a", None, "c", "a", "b"], ["a", "b"], ["b"] * 5, [*"aabbb"]):  # five: as many as tokens
        x = images(len(ids))
        with bank.use(ids), torch.no_grad():
            bank.model(x / 0)  # the search for the samples must not take these NaN for its own
            y = bank.model(x)
        torch.testing.assert_close(y, one_by_one(models, ids, x), rtol=1e-4, atol=1e-5)
    bank, x = AdapterBank(bare(make)), images(2)
    for config in (ek.LoRAConfig(rank=2), METHODS[method]):  # the first adapts no MLP, so that its search sees none
        bank.add(name := type(config).__name__, model := trained(config, make))
        with bank.use([name, None]), torch.no_grad():
            y = bank.model(x)
        want = one_by_one({name: model, None: bare(make)}, [name, None], x)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    del bank._batch_dims["blocks.1.mlp.fc1"]  # as of a Linear that the search did not reach
    with bank.use([name, None]), pytest.raises(ValueError, match="before a forward of the model has shown"):
        bank.model.blocks[1].mlp.fc1(torch.randn(2, 5, 192))


class Calls:
    """What a forward changes, as it does a cache; the second block may be left out."""

    count, short = 0, False


def with_calls(**options):
    model = vit(**options)
    forward, block = model.forward, model.blocks[1].forward
    calls = model.calls = Calls()

    def run(x, given=calls, scaled=False):
        given.count += 1
        return forward(x / x.abs().max() if scaled else x)

    model.forward, model.blocks[1].forward = run, lambda x: x if calls.short else block(x)
    return model


@pytest.mark.parametrize("scaled", [False, True])
def test_what_the_search_for_the_samples_cannot_see(scaled):
    """It changes no object of the caller, and leaves what it does not reach, or where NaN spreads, as it was."""
    bank, models = filled(make=with_calls)
    x, ids, calls = images(3), ["a", None, "b"], Calls()
    for short in (True, False):
        for model in (bank.model, *models.values()):
            model.calls.short = short
        with bank.use(ids), torch.no_grad():
            y = bank.model(x, calls, scaled)
        torch.testing.assert_close(y, one_by_one(models, ids, x / x.abs().max() if scaled else x), rtol=1e-4, atol=1e-5)
    assert calls.count == 2


def test_a_linear_whose_input_does_not_keep_the_samples_together_is_named():
    bank, _ = filled()
    with bank.use(["a", "b"]):
        with pytest.raises(ValueError, match=r"blocks.0.mlp.fc1 gets x \[2, 192\] before a forward of the model"):
            bank.model.blocks[0].mlp.fc1(torch.randn(2, 192))
        bank.model(images(2))
        with pytest.raises(ValueError, match=r"blocks.0.attn.qkv gets x \[5, 4, 192\], whose first or second dim"):
            bank.model.blocks[0].attn.qkv(torch.randn(5, 4, 192))
        refuses(ValueError, r"head gets x \[3, 192\], whose first or second", bank.model.head, torch.randn(3, 192))
        refuses(ValueError, r"blocks.0.mlp.fc1 gets x \[192\]", bank.model.blocks[0].mlp.fc1, torch.randn(192))
    mlp = bank.model.blocks[0].mlp  # its fc1 is called twice, with five samples and five tokens in both orders
    mlp.register_forward_pre_hook(lambda _, args: (mlp.fc1(args[0].transpose(0, 1)), None)[1])
    with bank.use([*"abcab"]), pytest.raises(ValueError, match=r"blocks.0.mlp.fc1 gets x \[5, 5, 192\], whose first"):
        bank._tried = 0
        bank.model(images(5))
    flat = lambda y, x: y.unflatten(0, (x.shape[1], -1)).transpose(0, 1)
    bank, _ = filled(make=reordered(lambda x: x.transpose(0, 1).flatten(0, 1), flat))
    bank.model.train().blocks[1].norm1 = norm = nn.BatchNorm1d(5)
    with bank.use(["a", "b"]), pytest.raises(ValueError, match=r"blocks.0.mlp.fc1 gets x \[10, 192\], whose first or"):
        bank.model(images(2))
    assert norm.training and norm.running_mean.isfinite().all()


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    bank, _ = filled()
    ek.save_adapter(trained(), tmp_path / "file")
    (tmp_path / "broken").write_bytes((tmp_path / "file").read_bytes()[:-7])
    batchnorm = ek.inject(bare(), PLAIN, head=nn.Sequential(nn.BatchNorm1d(192), nn.Linear(192, 3)))
    merged, disabled = ek.merge(trained()), trained()
    disabled.efft.active = None
    for name, source, error, says in [
        ("a", tmp_path / "file", ValueError, "name must be new, but the bank already has an adapter 'a'"),
        ("", tmp_path / "file", ValueError, "name must not be empty"),
        (None, tmp_path / "file", TypeError, "name must be a string, got NoneType"),
        ("x", tmp_path / "none", FileNotFoundError, "there is no adapter file"),
        ("x", tmp_path / "broken", ValueError, "truncated or corrupt"),
        ("x", 3, TypeError, "source must be the path of an adapter file or an injected model, got int"),
        ("x", bare(), ValueError, "must have adapters"),
        ("x", merged, ValueError, "is merged"),
        ("x", AdapterBank(vit(depth=3)).read(trained(depth=3)), ValueError, "got one of another VisionTransformer"),
        ("x", disabled, ValueError, "must have an active adapter"),
        ("x", trained(depth=3), ValueError, "whose Linears or shapes differ from those of this VisionTransformer"),
        ("x", batchnorm, ValueError, "the head in this VisionTransformer does not fit: head"),
    ]:
        refuses(error, says, bank.add, name, source)
    assert bank.names == ["a", "b", "c"]
    weight_norm((model := bare()).head)
    with pytest.raises(ValueError, match="file adapts head, whose weight must be plain in a bank, got one that is"):
        AdapterBank(model).add("x", tmp_path / "file")
    for act in (bank.remove, bank.parameters, bank.classes, bank.bytes, lambda name: bank.save(name, tmp_path / "x")):
        refuses(ValueError, "name must be one of the bank's adapters, 'a', 'b', 'c', got 'x'", act, "x")
    refuses(ValueError, "of which there are none", AdapterBank(bare()).remove, "x")


def test_models_that_cannot_have_a_bank():
    for model, says in [
        (ek.inject(bare(), PLAIN), "already injected"),
        (ek.merge(trained()), "is merged"),
        (AdapterBank(bare()).model, "already has an attribute 'efft', a AdapterBank"),
    ]:
        refuses(ValueError, says, AdapterBank, model)
    refuses(TypeError, "model must be an nn.Module, got int", AdapterBank, 3)
    refuses(ValueError, "backend must be one of", AdapterBank, bare(), backend="fast")
    refuses(ValueError, "already has an attribute 'efft', a AdapterBank", ek.inject, AdapterBank(bare()).model, PLAIN)


def test_a_head_that_differs_beyond_its_classifier(tmp_path):
    make = lambda: nn.Sequential(nn.LayerNorm(192), nn.Linear(192, 3))
    model = bare()
    model.head = make()
    other = copy.deepcopy(model)
    ek.inject(other, PLAIN)
    bank = AdapterBank(model)
    bank.add("a", other)
    bank.save("a", tmp_path / "a")
    assert ek.read_adapter(tmp_path / "a").head.keys() == {f"head.{key}" for key in other.head.state_dict()}
    with torch.no_grad():
        other.head[0].weight.add_(1)
    refuses(ValueError, "must differ .* in its last Linear alone.* head.0.weight differs too", bank.add, "b", other)
