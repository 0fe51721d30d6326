"""plan and inject: adapters on a model, in place."""

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from .adapted_linear import AdaptedLinear
from .attention import with_projections
from .base_linears import DenseWeights, has_own_forward, kept_in, untrainable
from .calls import call_linear, uncall_linear
from .configs import MethodConfig
from .groups import make_group
from .layouts import (
    HEADS,
    classifiers_of,
    heads_of,
    norms_outside,
    tell_classes,
    tell_number,
    told_classes,
    untrained_heads,
)
from .ops import check_backend
from .passes import Adapters
from .plans import Plan, patterns, plan
from .precision import beside, check_factor_dtype
from .wrappers import before_parallel, module_at, named_modules, named_parameters, on_unwrapped, outermost, put_at


@before_parallel
def inject(
    model: nn.Module,
    config: MethodConfig,
    *,
    name: str = "default",
    head: str | int | nn.Module = "train",
    train: Sequence[str] = (),
    factor_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> nn.Module:
    """Put adapters on a model, in place, and freeze the rest. Outputs do not change: the updates start at zero.

    Afterwards the model owns each factor once, as ``efft.<name>.<group>.<factor>``; all other names in its state_dict
    are unchanged. Batch norms outside the head keep their statistics.

    Args:
        model, config: as :func:`plan`.
        name: of the adapter; :func:`efft_kernels.add_adapter` puts further ones on the model.
        head: the classifier is trained ("train"), left unchanged and frozen ("keep"), or replaced and trained (a number
            of classes, or a module). It is found by its name also within a wrapper, and behind a model in a wrapper if
            it is made of Linears.
        train: paths of further modules to train in full, such as ("decode_head",). They are saved and loaded together
            with the adapter, and :func:`adapter_parameters` has them.
        factor_dtype: of the factors, and so of the optimizer's state. Float32, the default, keeps them float32 beside
            bfloat16 and float16 weights, whose few digits would swallow small steps, also when the model is cast to
            these later; beside float64 weights it means float64. A forward casts them once to the dtype of the weights,
            or of autocast.
        backend: a name from :func:`efft_kernels.backends`, or None for the fastest proven one.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: as :func:`plan`; a model that is already injected or merged, a name that cannot be used,
            no head to replace or several of unequal widths, a module of ``train`` that does not exist, has no
            parameters or holds an adapted Linear, a factor_dtype that is no floating-point dtype. The model is
            unchanged then.

    Warns:
        UserWarning: Linears of the adapted blocks are left out, or a classifier or another module on top of the model
            is not trained; :attr:`Plan.left_out` has the details.
    """
    check_bare(model)
    check_name(name)
    check_backend(backend)
    made = plan(model, config)
    groups, train = build(made, model, factor_dtype), check_train(model, train, made)
    if said := _unsaid(model, made, head, train):
        warnings.warn(said, stacklevel=4)  # before the first change, because a warning may be turned into an error
    return install(model, name, groups, head, backend, train)


def check_train(model: nn.Module, train: Sequence[str], made: Plan) -> tuple[str, ...]:
    """The paths of modules to train in full, each once.

    Raises:
        TypeError, ValueError: as :func:`inject`.
    """
    if isinstance(train, str) or not isinstance(train, Iterable) or not all(isinstance(path, str) for path in train):
        raise TypeError(f"train must be a sequence of paths of modules, got {train!r}")
    modules, adapted = dict(named_modules(model)), [slot.site.path for group in made.groups for slot in group.slots]
    for path in train:
        if not path or path not in modules:
            known = ", ".join(repr(key) for key, _ in model.named_children())
            raise ValueError(f"train must name modules of this {type(model).__name__}, such as {known}, got {path!r}")
        if not any(True for _ in modules[path].parameters()):
            raise ValueError(f"train must name modules with parameters, but {path} has none")
        if inside := [key for key in adapted if f"{key}.".startswith(f"{path}.") or path.startswith(f"{key}.")]:
            raise ValueError(f"train must name modules that are not adapted, but {inside[0]} is in {path!r}")
    return tuple(dict.fromkeys(train))


def _unsaid(model: nn.Module, made: Plan, head, train: tuple[str, ...]) -> str:
    """one sentence about Linears and classifiers that a user may expect to be adapted or trained; empty if none are"""
    said = []
    if missed := [item.path for item in made.left_out if item.unexpected]:
        said.append(f"{len(missed)} layers of its adapted blocks are not adapted ({patterns(missed)})")
    if head == "train":
        heads = heads_of(model)
        if beside := untrained_heads(model, (*heads, *train)):
            some = ", ".join(beside[:3]) + ", ..." * (len(beside) > 3)
            said.append(f"{some} stay frozen, which train={tuple(beside)} would train")
        elif not train and not any(True for module in heads.values() for _ in module.parameters()):
            said.append("it has no classifier that was found and trained (train= names one, head='keep' wants none)")
    if not said:
        return ""
    return f"{type(model).__name__}: {', and '.join(said)}; plan(model, config).left_out has what is left out"


def trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The head of an injected model, and the modules that ``train`` named, by path."""
    return heads_of(model) | {path: module_at(model, path) for path in adapters(model).trained}


@torch.inference_mode(False)  # a server may start under it, but an inference tensor could never be trained
def build(
    made: Plan, model: nn.Module, factor_dtype: torch.dtype = torch.float32, *, empty: bool = False
) -> nn.ModuleDict:
    """The groups of a plan, not yet on the model, with new factors; ``empty`` if these are about to be loaded."""
    check_factor_dtype(factor_dtype)
    groups = nn.ModuleDict()
    for spec in made.groups:
        linears = {slot.site.path: module_at(model, slot.site.path) for slot in spec.slots}
        for path, linear in linears.items() if getattr(made.config, "dora", False) else ():
            if has_own_forward(linear, getattr(linear, "base", type(linear))):
                raise ValueError(
                    f"dora=True needs a plain weight in {path}, got a {type(linear).__name__} of its own kind"
                )
        dtypes, devices = map(set, zip(*map(kept_in, linears.values())))
        dtypes = dtypes - {None} or {torch.float32}
        if len(dtypes) > 1 or len(devices) > 1:
            kinds = ", ".join(sorted(map(str, dtypes | devices)))
            raise ValueError(f"the Linears of group {spec.name!r} must be of one dtype and device, got {kinds}")
        (dtype,), (device,) = dtypes, devices
        dtype = beside(dtype, factor_dtype)
        weights = DenseWeights(linears, dtype, device)
        if empty:
            weights = dict.fromkeys(linears, torch.empty(0, dtype=dtype, device=device))
        groups[spec.name] = make_group(spec, made.config, weights)
    groups.plan = made
    groups.preparation, groups.classes, groups.multilabel = None, None, False  # what an adapter file states
    groups.beside_head = True  # whether the model's head, where no file has one, is that beside which they are trained
    return groups


def install(
    model: nn.Module, name: str, groups: nn.ModuleDict, head, backend: str | None, train: tuple[str, ...] = ()
) -> nn.Module:
    """Put built groups on a plain model and freeze the rest. Every check comes before the first change."""
    head = int(head) if isinstance(head, Integral) and not isinstance(head, bool) else head  # one of NumPy
    heads = list(heads_of(model))
    replacements = _replacements(model, heads, head)
    trained = (*train, *(heads if head != "keep" else ()))
    _check_trainable(model, trained, [getattr(owner, key) for owner, key, _ in replacements])
    before = {key: p.requires_grad for key, p in named_parameters(model)}
    modules_before, told = _copies(model, list(trained)), told_classes(model) if head != "keep" else {}

    for owner, key, module in replacements:
        setattr(owner, key, module)
    if isinstance(head, nn.Module):
        head = next((linear.out_features for _, linear in classifiers_of(model)), "train")
    if isinstance(head, int):
        tell_number(model, head)
    model.requires_grad_(False)
    for path in trained:
        module_at(model, path).requires_grad_(True)
    attach(model, Adapters(backend, frozen_norms=tuple(norms_outside(model, (*heads, *train)))))
    model.efft.trained = train
    model.efft.requires_grad_before, model.efft.modules_before = before, modules_before
    model.efft.told_before = told
    mount(model, name, groups)
    model.efft.active = name
    return model


def _copies(model: nn.Module, paths: list[str]) -> dict[str, nn.Module]:
    """Frozen copies of modules that are about to be trained or replaced, of those that have values (not on meta)."""
    modules = {path: module_at(model, path) for path in paths}
    known = (path for path, m in modules.items() if not any(t.is_meta for t in (*m.parameters(), *m.buffers())))
    found = {}
    for path in outermost(known):  # a part that is put back by itself would be left out when its whole is
        try:
            found[path] = copy.deepcopy(modules[path]).requires_grad_(False)
        except RuntimeError as error:  # a weight that a hook computes, as the older weight_norm does
            raise ValueError(
                f"{path} must be copied, for disable_adapter to restore it, but cannot be: {error}; use the "
                "parametrizations of torch.nn.utils.parametrizations there, or head='keep'"
            ) from error
    return found


@contextlib.contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Within this context the modules that are trained with the factors are replaced by those of before inject."""
    trained, owner = {}, model.efft
    told = {at: values for at, values in told_classes(model).items() if at in owner.told_before}
    for path, module in owner.modules_before.items():
        trained[path] = module_at(model, path)
        _put_in_place(model, path, module)
    tell_classes(model, owner.told_before)
    owner.swapped += 1
    try:
        yield
    finally:
        owner.swapped -= 1
        for path in owner.modules_before:  # none any more if the last adapter was deleted
            _put_in_place(model, path, trained[path])
        if owner.modules_before:
            tell_classes(model, told)


def _put_in_place(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at this path, and follow what was done to the model since: its mode, device and dtype."""
    now = module_at(model, path)
    like, own = next(now.parameters(), None), next(module.parameters(), None)
    if like is not None and own is not None and (like.device, like.dtype) != (own.device, own.dtype):
        module.to(like.device, like.dtype)
    if module.training != now.training:  # else its parts keep modes of their own
        module.train(now.training)
    put_at(model, path, module)


def attach(model: nn.Module, owner: Adapters) -> None:
    """Register the adapters on the model, and the hooks around its forward that they need."""
    model.efft = owner.train(model.training)
    owner.hooks = (model.register_forward_pre_hook(_before), model.register_forward_hook(_after, always_call=True))


def detach(model: nn.Module) -> list[str]:
    """Turn adapted Linears into plain ones and take the adapters off. Returns the paths of those Linears."""
    named = with_projections(named_modules(model))
    paths = [path for path, module in named if isinstance(module, AdaptedLinear)]
    for path in paths:
        module_at(model, path).release()
        uncall_linear(model, path)
    for hook in model.efft.hooks:
        hook.remove()
    del model.efft
    return paths


def adapted_linears(model: nn.Module, groups: nn.ModuleDict) -> dict[str, AdaptedLinear]:
    """path -> Linear, of those that the groups of an adapter adapt.

    Raises:
        ValueError: one of them was removed from the model or replaced.
    """
    found = {}
    for path in (path for group in groups.values() for path in group.slots):
        try:
            linear = module_at(model, path)
        except AttributeError:
            linear = None
        if not isinstance(linear, AdaptedLinear) or linear.efft[0] is not model.efft:
            what = "nothing" if linear is None else f"a {type(linear).__name__}"
            raise ValueError(f"{path} must be the Linear that inject adapted, but {what} is there now")
        found[path] = linear
    return found


def mount(model: nn.Module, name: str, groups: nn.ModuleDict) -> None:
    """Register the groups on an injected model and adapt those of their Linears that are still plain."""
    for key, group in groups.items():
        for others in model.efft.values():
            if key in others and others[key].spec == group.spec:
                # torch.compile compares them by identity: with the same ones a switch of adapters takes no new graph
                group.spec, group.slots = others[key].spec, others[key].slots
    model.efft[name] = groups.train(model.training)
    for group in groups.values():
        for path in group.slots:
            linear = module_at(model, path)
            if not isinstance(linear, AdaptedLinear):
                AdaptedLinear.adopt(linear, path, model.efft)
                call_linear(model, path)


def _as_split(t, now) -> Tensor:
    """A tensor as the one that it replaces, which FSDP2 may have split among processes."""
    if not isinstance(now, Tensor) or not hasattr(now, "device_mesh"):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(now.device), now.device_mesh, now.placements)


def eject(model: nn.Module) -> None:
    """Take all adapters off and restore the modules and requires_grad of before inject. Norms get the model's mode."""
    owner, before = model.efft, model.efft.requires_grad_before
    detach(model)
    modules = dict(named_modules(model))  # without those that were removed since
    for path in owner.modules_before.keys() & modules.keys():
        now, module = modules[path], owner.modules_before[path]
        kinds = [(type(m), {k: getattr(t, "shape", 0) for k, t in m.state_dict().items()}) for m in (now, module)]
        if kinds[0] == kinds[1]:
            state = now.state_dict()
            now.load_state_dict({key: _as_split(t, state[key]) for key, t in module.state_dict().items()})
        else:  # otherwise in the same object, because others may refer to it
            _put_in_place(model, path, module)
    if owner.modules_before.keys() - owner.trained or owner.modules_before.keys() & heads_of(model):
        tell_classes(model, owner.told_before)
    owner.modules_before, owner.told_before = {}, {}
    for norm in owner.frozen_norms:
        norm.train(model.training)
    parameters = dict(named_parameters(model))
    for key in before.keys() & parameters.keys():  # a head that was replaced may have other names
        parameters[key].requires_grad_(before[key])


@on_unwrapped
def adapters(model: nn.Module) -> Adapters:
    """The adapters of an injected model.

    Raises:
        ValueError: any other model.
    """
    owner = model._modules.get("efft")  # not getattr: PEFT's wrapper hands out the attributes of the model in it
    if isinstance(owner, Adapters):
        return owner
    state = "is merged, unmerge it first" if hasattr(model, "_efft_merged") else "has none, inject it first"
    raise ValueError(f"the model must have adapters, but this {type(model).__name__} {state}")


def check_name(name: str) -> None:
    """Refuse what cannot name an adapter, which is an attribute of a module and a part of state_dict keys.

    Raises:
        ValueError: not a word, or the name of another attribute.
    """
    if not isinstance(name, str) or not name or "." in name or hasattr(Adapters(), name):
        raise ValueError(f"name must be a non-empty word without dots that is no attribute of a module, got {name!r}")


@on_unwrapped
def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters for the optimizer: the factors of the active adapter, the head if it is trained, and the modules
    that ``train`` named.

    Raises:
        ValueError: a model without adapters, or none of which is active now.
    """
    if (owner := adapters(model)).active is None:
        raise ValueError(
            "adapter_parameters needs an active adapter: set_adapter(model, name), outside of disable_adapter"
        )
    found = [p for group in owner.groups() for p in group.parameters()]
    found += [p for module in trained_modules(model).values() for p in module.parameters()]
    return [p for p in dict.fromkeys(found) if p.requires_grad]


def adapter_parameter_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict]:
    """The parameters of :func:`adapter_parameters` with two learning rates (LoRA+, arXiv 2402.12354).

    >>> optimizer = torch.optim.AdamW(adapter_parameter_groups(model, lr=2e-4))

    Args:
        model: an injected model.
        lr: learning rate of the factors that start at random, of optional ones that start at 1, and of the head.
        ratio: of the learning rate of the factors that start at zero (V or U of EFFT, V of FacT, B of LoRA) to ``lr``.

    Raises:
        ValueError: a model without adapters, or a rate, a ratio or their product that is not a finite number above 0.
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    if not 0 < (fast := float(lr) * float(ratio)) < float("inf"):
        raise ValueError(f"lr * ratio must be a finite number above 0, got {lr!r} * {ratio!r} = {fast}")
    late = starting_at_zero(model)
    ids = {id(p) for p in late}
    others = [p for p in adapter_parameters(model) if id(p) not in ids]
    late = [p for p in late if p.requires_grad]
    return [{"params": others, "lr": float(lr)}, {"params": late, "lr": fast}]


def starting_at_zero(model: nn.Module) -> list[nn.Parameter]:
    """The factors of the active adapter that start at zero, so that its update does."""
    return [getattr(group, name) for group in adapters(model).groups() for name in group.starts_at_zero]


def _before(model: nn.Module, args) -> None:
    model.efft.begin(model)


def _after(model: nn.Module, args, output) -> None:
    model.efft.end(model, output)


def check_bare(model: nn.Module) -> None:
    """Refuse a model that cannot be injected in its present state.

    Raises:
        ValueError: merged, already injected, created under inference_mode, or with an attribute ``efft``.
    """
    if hasattr(model, "_efft_merged"):
        raise ValueError("the model is merged; unmerge it first")
    if isinstance(getattr(model, "efft", None), Adapters):
        names = ", ".join(map(repr, model.efft))
        raise ValueError(f"the model is already injected with {names}; add_adapter adds another one")
    if any(p.is_inference() for p in model.parameters()) and not torch.is_inference_mode_enabled():
        raise ValueError("the model's parameters were created under inference_mode and cannot be changed or trained")
    if hasattr(model, "efft"):
        raise ValueError(f"the model already has an attribute 'efft', a {type(model.efft).__name__}")


@torch.inference_mode(False)
def _replacements(model: nn.Module, heads: list[str], head) -> list[tuple[nn.Module, str, nn.Module]]:
    """(owner, attribute, new module) for each head to replace"""
    if head in ("train", "keep"):
        return []
    if isinstance(head, bool) or not isinstance(head, int | nn.Module) or (isinstance(head, int) and head < 1):
        raise ValueError(f"head must be 'train', 'keep', a number of classes or a module, got {head!r}")
    if isinstance(head, nn.Module):
        if len(heads) != 1:
            raise ValueError(f"head can be a module only if there is one head, got {heads} in {type(model).__name__}")
        owner, _, key = heads[0].rpartition(".")
        return [(module_at(model, owner), key, head)]
    found, widths = [], {path: linear.out_features for path, linear in classifiers_of(model)}
    if len(set(widths.values())) > 1:
        raise ValueError(f"head={head} replaces classifiers of equal widths, got {widths}; replace one by hand instead")
    for path, old in classifiers_of(model):
        dtype, device = kept_in(old)
        new = nn.Linear(old.in_features, head, old.bias is not None, device=device, dtype=dtype)
        nn.init.trunc_normal_(new.weight, std=0.02)
        if new.bias is not None:
            nn.init.zeros_(new.bias)
        owner, _, attribute = path.rpartition(".")
        found.append((module_at(model, owner), attribute, new.train(old.training)))
    if not found:
        raise ValueError(f"{type(model).__name__} has no classifier Linear to replace among {HEADS}")
    return found


def _check_trainable(model: nn.Module, trained: tuple[str, ...], replaced: list[nn.Module]) -> None:
    gone = {id(part) for module in replaced for part in module.modules()}
    inside = tuple(f"{path}." for path in trained)
    parts = {id(part): part for path in trained for part in module_at(model, path).modules() if id(part) not in gone}
    own = {id(p) for part in parts.values() for p in part.parameters(recurse=False)}
    for path, module in named_modules(model):
        if f"{path}.".startswith(inside) and id(module) not in gone:
            if isinstance(module, nn.Linear) and (why := untrainable(module)):
                raise ValueError(
                    f"{path} {why} and cannot be trained: exclude the head from that, or pass head='keep' or a number "
                    "of classes for a new head"
                )
        elif id(module) not in parts:
            for key in (key for key, p in module._parameters.items() if id(p) in own):
                raise ValueError(
                    f"{path}.{key} stays frozen, but is also a parameter of what is trained, {', '.join(trained)}: "
                    "untie them, or leave that out with head='keep' or train=()"
                )
