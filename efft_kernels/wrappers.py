"""Modules that torch puts around others (compile, checkpointing, parallel training), which are no part of a path."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec, TypeVar

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .attention import projections

_INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_REDUCERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)

P = ParamSpec("P")
R = TypeVar("R")


def _inside(module: nn.Module) -> nn.Module | None:
    """what this module wraps, if it is a wrapper of torch"""
    modules = module._modules
    for key in _INSIDE:
        if modules.get(key) is not None:
            return modules[key]
    return modules["module"] if isinstance(module, (*_REDUCERS, AveragedModel)) else None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers of torch around it; a module without any is returned itself."""
    while (inside := _inside(module)) is not None:
        module = inside
    return module


def module_at(model: nn.Module, path: str) -> nn.Module:
    """As ``model.get_submodule(path)``, for a path without wrappers: the module inside those that are on the way.

    The last name may be that of an input projection of an nn.MultiheadAttention (attention.py).

    Raises:
        AttributeError: there is none.
    """
    module = unwrapped(model)
    for name in path.split(".") if path else ():
        inner = module._modules.get(name)
        module = projections(module).get(name) if inner is None else inner
        if module is None:
            raise AttributeError(f"this {type(model).__name__} has no module {path}")
        module = unwrapped(module)
    return module


def put_at(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path without wrappers; those around the module that it replaces stay."""
    parent, _, name = path.rpartition(".")
    owner = module_at(model, parent)
    while (wrapper := owner._modules.get(name)) is not None and _inside(wrapper) is not None:
        owner, name = wrapper, next(key for key, inside in wrapper._modules.items() if inside is _inside(wrapper))
    setattr(owner, name, module)


def outermost(paths: Iterable[str]) -> list[str]:
    """Those of the paths that are inside no other one of them, each once."""
    paths = list(dict.fromkeys(paths))
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def named_modules(model: nn.Module, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules()``, without wrappers: neither among the modules nor in the paths."""
    seen, model = set() if seen is None else seen, unwrapped(model)
    if id(model) in seen:
        return
    seen.add(id(model))
    yield path, model
    for name, module in model._modules.items():
        if module is not None:
            yield from named_modules(module, f"{path}.{name}" if path else name, seen)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As ``model.named_parameters()``, with paths without wrappers."""
    for path, module in named_modules(model):
        yield from module.named_parameters(path, recurse=False)


def check_module(model: object) -> None:
    """Raise TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def on_unwrapped(function: Callable[P, R]) -> Callable[P, R]:
    """Call a function on the model inside the wrappers of its first argument, which it returns in place of that.

    Raises:
        TypeError: the first argument is no module.
    """

    @functools.wraps(function)
    def call(model, *args, **kwargs):
        check_module(model)
        inside = unwrapped(model)
        result = function(inside, *args, **kwargs)
        return model if result is inside else result

    return call


def whole(t: Tensor) -> Tensor:
    """A tensor, gathered if FSDP2 has sharded it among processes, each of which must call this then."""
    return t.full_tensor() if is_sharded(t) else t


def is_sharded(t: object) -> bool:
    """Whether it is a DTensor, as fully_shard makes of parameters."""
    return isinstance(t, Tensor) and hasattr(t, "device_mesh")


def refuse_sharded(model: nn.Module, what: str, parts: Iterable[nn.Module] | None = None) -> None:
    """Raise a ValueError, which begins with ``what``, if FSDP2 has sharded the model or a module in it, or if one of
    its ``parts`` (default: all of it) has a DTensor, as tensor parallelism makes, too."""
    how = "call it before that, or on a model into which the gathered state_dict was loaded"
    every = (model,) if parts is None else parts
    found = [name for part in every for name, p in part.named_parameters() if is_sharded(p)]
    # between forward and backward FSDP2 has plain parameters, but what is written into them is lost
    for name in found or (type(m).__name__ for m in model.modules() if hasattr(type(m), "_get_fsdp_state")):
        raise ValueError(f"{what} needs whole tensors, but {name} is sharded among processes: {how}")


def before_parallel(function: Callable[P, R]) -> Callable[P, R]:
    """As :func:`on_unwrapped`, for a function that adds parameters: what reduces gradients would not know of these.

    Raises:
        ValueError: the model is, or contains, a wrapper for parallel training, or is sharded.
    """
    inner = on_unwrapped(function)

    @functools.wraps(function)
    def call(model, *args, **kwargs):
        for module in model.modules() if isinstance(model, nn.Module) else ():
            if isinstance(module, _REDUCERS) or "_fsdp_wrapped_module" in module._modules:
                raise ValueError(
                    f"adapters must be put on the model before it is wrapped in {type(module).__name__}, which would "
                    "not reduce the gradients of new parameters"
                )
        if isinstance(model, nn.Module):
            refuse_sharded(model, function.__name__, ())
        return inner(model, *args, **kwargs)

    return call
