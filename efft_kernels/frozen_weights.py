"""Samples of a model's frozen weights, by which an adapter file knows the weights that it was trained on.

Eight values of each floating-point tensor are kept. They tell two trainings apart and are read in milliseconds. They
are values and not a hash because the same weights may be loaded in another dtype. A change of other entries than the
sampled ones is not seen.
"""

import base64
import json
from collections.abc import Collection

import torch
from torch import Tensor, nn

from .wrappers import named_modules

_COUNT = 8  # values of a tensor
_COMPUTED = ("original", "original0", "original1", "_orig", "_g", "_v")  # ends of names of what weights come from
_GOLDEN = 0.6180339887498949  # multiples of it modulo 1 spread evenly, and do not follow rows or columns


def sample(model: nn.Module, left_out: Collection[str] = ()) -> str:
    """The samples of a model as text for a file: {name: [dtype, shape, values in base64]}.

    Args:
        model: whose parameters and persistent buffers are sampled. Tensors that are quantized, sharded or on the meta
            device are left out.
        left_out: names in its state_dict of what is not frozen. The factors of adapters are always left out.
    """
    found = _readable(model, left_out)
    made = {}
    for (key, t), values in zip(found.items(), _values(list(found.values()))):
        packed = base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()
        made[key] = [str(t.dtype).removeprefix("torch."), list(t.shape), packed]
    return json.dumps(made, separators=(",", ":"))


def differences(model: nn.Module, samples: str, heads: tuple[str, ...] = ()) -> tuple[list[str], int]:
    """(names of the tensors that differ from their samples, number of tensors compared)

    A tensor differs if a value differs by more than the rounding of the coarser of both dtypes, or if only one side has
    it, as a register token. One of another shape (a table of places for other images) that is not in one of ``heads``,
    one that cannot be read here and a weight that a parametrization computes are not compared.

    Raises:
        ValueError: samples is not what :func:`sample` gives.
    """
    try:
        there = {key: _Sample(*entry) for key, entry in json.loads(samples).items()}
    except (AttributeError, TypeError, ValueError, RecursionError, RuntimeError) as error:
        raise ValueError(f"the samples of the frozen weights cannot be read: {error}") from error
    found, modules = _readable(model, ()), dict(named_modules(model))
    own = {key: t for key, t in found.items() if key in there and there[key].shape == tuple(t.shape)}
    owner = lambda key: modules.get(key.rpartition(".")[0])
    has = lambda key: key.endswith(_COMPUTED) or getattr(owner(key), key.rpartition(".")[2], None) is not None
    other = [key for key in there if key not in found and not has(key)]
    beside = [module for key in there if (module := owner(key)) is not None and module._modules]
    other += [key for key in found.keys() & there.keys() - own.keys() if key.startswith(heads)]
    other += [key for key in found if key not in there and owner(key) in beside and not key.endswith(_COMPUTED)]
    if not own:
        return other, len(other)
    mine, theirs = torch.stack(_values(list(own.values()))), torch.stack([there[key].values for key in own])
    steps = torch.tensor([max(there[key].step, torch.finfo(t.dtype).eps) for key, t in own.items()])[:, None]
    # float16 has no step below 6e-8
    same = ((mine - theirs).abs() <= steps * theirs.abs() + 1e-7) | (mine == theirs) | (mine.isnan() & theirs.isnan())
    other += [key for key, equal in zip(own, same.all(1).tolist()) if not equal]
    return other, len(own | dict.fromkeys(other))


class _Sample:
    def __init__(self, dtype: str, shape: list[int], packed: str):
        self.step = torch.finfo(getattr(torch, dtype)).eps
        self.shape = tuple(shape)
        self.values = torch.frombuffer(bytearray(base64.b64decode(packed)), dtype=torch.float32).reshape(_COUNT)


def _readable(model: nn.Module, left_out: Collection[str]) -> dict[str, Tensor]:
    """The parameters and persistent buffers that can be sampled, without those of adapters."""
    found = {}
    for path, module in named_modules(model):
        buffers = {name: t for name, t in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, t in (module._parameters | buffers).items():
            key = f"{path}.{name}" if path else name
            if _can_be_read(t) and key not in left_out and not key.startswith("efft."):
                found[key] = t.detach()
    return found


def _can_be_read(t: Tensor | None) -> bool:
    plain = type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and t.is_floating_point()
    return plain and not t.is_meta and t.numel() > 0 and t.element_size() >= 2


def _values(tensors: list[Tensor]) -> list[Tensor]:  # each [8] float32, on the CPU
    """The sampled values of each tensor; one copy per device."""
    on = {}
    for i, t in enumerate(tensors):
        at = [min(int((k + 1) * _GOLDEN % 1 * t.numel()), t.numel() - 1) for k in range(_COUNT)]
        on.setdefault(t.device, []).append((i, t.take(torch.tensor(at, device=t.device)).float()))
    values = [torch.empty(0)] * len(tensors)
    for parts in on.values():
        for (i, _), row in zip(parts, torch.stack([row for _, row in parts]).cpu()):
            values[i] = row
    return values
