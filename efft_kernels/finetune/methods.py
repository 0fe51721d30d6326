"""The methods that can be compared, behind one interface: each adapts a model in place and selects what is trained.

EFFT, FacT and LoRA are those of this library. The others add modules to the Linears and norms of a backbone by hooks,
which keeps the names in its state_dict; they are in baselines.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter_file import read_stated, stated
from ..configs import EFFTConfig, FacTConfig, LoRAConfig
from ..files import load_adapter, save_adapter
from ..inject import inject, starting_at_zero
from ..layouts import head_state, heads_of
from ..preparation import Preparation
from ..tensor_file import read_tensors, write_tensors
from . import baselines

_FORMAT = "efft_kernels finetune 2"
_OLDER = "efft_kernels finetune 1"  # without a digest, preparation and classes


@dataclass(frozen=True)
class Method:
    """One way to fine-tune."""

    name: str
    meaning: str
    options: Mapping[str, object]  # name -> default
    prepare: Callable[..., None]  # (model, **options): adapts the model in place and sets requires_grad


def _injected(name: str, meaning: str, config: type, **fixed) -> Method:
    defaults = {field.name: field.default for field in fields(config) if field.name not in fixed}
    return Method(name, meaning, defaults, lambda model, **options: inject(model, config(**fixed, **options)))


def _freeze(model: nn.Module) -> None:
    model.requires_grad_(False)
    for head in heads_of(model).values():
        head.requires_grad_(True)


def _full(model: nn.Module) -> None:
    model.requires_grad_(True)


def _bitfit(model: nn.Module) -> None:
    _freeze(model)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.requires_grad_(True)


def _added(add: Callable[..., None]) -> Callable[..., None]:
    """A method that freezes the model and adds modules that are trained."""

    def prepare(model: nn.Module, **options) -> None:
        requires_grad_before = {name: p.requires_grad for name, p in model.named_parameters()}
        _freeze(model)
        try:
            add(model, **options)
        except ValueError:
            for name, p in model.named_parameters():
                p.requires_grad_(requires_grad_before.get(name, False))
            raise

    return prepare


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("full", "every weight is trained", {}, _full),
        Method("linear", "only the head is trained", {}, _freeze),
        Method("bitfit", "biases and head (BitFit, arXiv 2106.10199)", {}, _bitfit),
        Method(
            "vpt-shallow",
            "prompts before the first block (VPT, arXiv 2203.12119)",
            {"tokens": 50},
            _added(partial(baselines.add_prompts, deep=False)),
        ),
        Method(
            "vpt-deep",
            "prompts before every block (VPT, arXiv 2203.12119)",
            {"tokens": 50},
            _added(partial(baselines.add_prompts, deep=True)),
        ),
        Method(
            "adapter",
            "a bottleneck after each FFN (Pfeiffer, arXiv 2005.00247), or attention, too (Houlsby, arXiv 1902.00751)",
            {"bottleneck": 8, "placement": "pfeiffer"},
            _added(baselines.add_adapters),
        ),
        Method(
            "adaptformer",
            "a bottleneck parallel to each FFN (AdaptFormer, arXiv 2205.13535)",
            {"bottleneck": 8, "scale": 0.1},
            _added(baselines.add_adaptformers),
        ),
        _injected("lora", "LoRA on q and v (arXiv 2106.09685)", LoRAConfig),
        Method("ssf", "a scale and shift after every operation (SSF, arXiv 2210.08823)", {}, _added(baselines.add_ssf)),
        _injected("fact-tt", "FacT, tensor train (arXiv 2212.03145)", FacTConfig, variant="tt"),
        _injected("fact-tk", "FacT, Tucker (arXiv 2212.03145)", FacTConfig, variant="tk"),
        _injected("efft1", "EFFT, one group (arXiv 2311.06749)", EFFTConfig, variant="efft1"),
        _injected("efft2", "EFFT, groups for attention and FFN (arXiv 2311.06749)", EFFTConfig, variant="efft2"),
        Method(
            "noah",
            "Adapter, LoRA and VPT together, sized block by block (NOAH, arXiv 2206.04673, without its search)",
            {"bottleneck": 8, "lora_rank": 8, "tokens": 8},
            _added(baselines.add_noah),
        ),
    )
}


def check(name: str, options: Mapping[str, object]) -> None:
    """Raise ValueError for an unknown method, or for an option that the method does not have."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    if unknown := sorted(set(options) - set(METHODS[name].options)):
        has = f"has {', '.join(METHODS[name].options)}" if METHODS[name].options else "has none"
        raise ValueError(f"{unknown[0]} is not an option of method {name!r}, which {has}")


def apply(name: str, model: nn.Module, options: Mapping[str, object] | None = None) -> nn.Module:
    """Adapt a model in place: add the modules of the method, and freeze everything that it does not train.

    Args:
        name: of METHODS.
        model: a vision transformer; for full, linear and bitfit any classifier.
        options: of the method; an option that is left out has its default.

    Raises:
        ValueError: an unknown method or option, or a model that the method does not fit. The model is unchanged then.
    """
    options = dict(options or {})
    check(name, options)
    if not heads_of(model):
        raise ValueError(f"model must have a head to train, but {type(model).__name__} has none")
    METHODS[name].prepare(model, **{**METHODS[name].options, **options})
    return model


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def parameter_groups(model: nn.Module, ratio: float) -> list[dict]:
    """The trained parameters for an optimizer; those that start at zero with ``lr_scale``, for timm's schedules.

    Raises:
        ValueError: a ratio other than 1, and a method whose factors do not start at zero.
    """
    every = trainable_parameters(model)
    if ratio == 1.0:
        return [{"params": every}]
    if not hasattr(model, "efft"):
        raise ValueError(f"lr_ratio must be 1 for a method without low-rank factors that start at zero, got {ratio}")
    late = {id(p) for p in starting_at_zero(model)}
    first, second = ([p for p in every if (id(p) in late) == zero] for zero in (False, True))
    return [{"params": first}, {"params": second, "lr_scale": ratio}]


def count(model: nn.Module) -> int:
    """The number of trained parameters without the head, as papers count them."""
    heads = {id(p) for head in heads_of(model).values() for p in head.parameters()}
    return sum(p.numel() for p in trainable_parameters(model) if id(p) not in heads)


def train_mode(model: nn.Module) -> nn.Module:
    """Call model.train(), but keep batch norms in evaluation mode unless all of their parameters are trained: the
    statistics of the others are not trained, and no file has them.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            trained = [p.requires_grad for p in module.parameters()]
            module.train(bool(trained) and all(trained))
    return model


def fingerprint(model: nn.Module) -> str:
    """A digest of the frozen weights, which tells pre-trained models apart."""
    digest = sha256()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            digest.update(name.encode())
            digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(
    name: str,
    options: Mapping[str, object],
    model: nn.Module,
    path: Path,
    base_model: str = "",
    preparation: Preparation | None = None,
    classes: Sequence[str] | None = None,
    multilabel: bool = False,
) -> None:
    """Write the trained parameters and the head; for a method of this library as save_adapter does.

    Raises:
        OSError: the file cannot be written; an existing one is unchanged then.
    """
    if hasattr(model, "efft"):
        said = {"preparation": preparation, "classes": classes, "multilabel": multilabel}
        save_adapter(model, path, base_model=base_model, head=True, **said)
        return
    made = {"format": _FORMAT, "method": name, "options": json.dumps(dict(options)), "base_model": base_model}
    made |= {"model": type(model).__name__, **stated(preparation, classes, multilabel)}
    write_tensors(path, _state(model), made)


def read_needs(path: Path) -> tuple[Preparation | None, tuple[str, ...] | None]:
    """(how images are prepared, names of the classes) as a file of :func:`save` states them; None for what it does not.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`.
    """
    metadata, _ = read_tensors(path, digested=[_FORMAT])
    try:
        return read_stated(metadata)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has damaged metadata: {error}") from error


def load(model: nn.Module, path: Path) -> nn.Module:
    """Load a file of :func:`save` into the model that it was made for, whose head has as many classes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or was made for another model. The model may be adapted by then.
    """
    metadata, tensors = read_tensors(path, digested=[_FORMAT])
    if metadata.get("format") not in (_FORMAT, _OLDER):
        return load_adapter(model, path)
    apply(metadata["method"], model, json.loads(metadata["options"]))
    own = _state(model)
    wanted, found = ({key: tuple(t.shape) for key, t in state.items()} for state in (own, tensors))
    if wanted != found:
        key = min(wanted.items() ^ found.items())[0]
        raise ValueError(f"{path} must hold {key} of shape {wanted.get(key)}, got {found.get(key)}")
    with torch.no_grad():
        for key, t in tensors.items():
            own[key].copy_(t)
    return model


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters and the head; the buffers, too, if everything is trained."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad} | set(head_state(model))
    buffers = {name for name, _ in model.named_buffers()} if all(p.requires_grad for p in model.parameters()) else set()
    return {key: t for key, t in model.state_dict().items() if key in trained | buffers}
