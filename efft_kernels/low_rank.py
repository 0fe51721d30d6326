"""What one Linear adds, the base of all groups of trained factors, and several adapters in one group."""

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configs import GroupSpec, MethodConfig
from .precision import at_least, floor, narrowed, without_autocast


class Pair(NamedTuple):
    """What one Linear adds: (x @ down) @ up, with ``dropout`` on x @ down while training."""

    down: Tensor  # [K, R]; on a GPU with K contiguous, as its kernels read it
    up: Tensor  # [R, N]
    dropout: float = 0.0


class Group(nn.Module):
    """The trained factors of one group of Linears, or of that group in several adapters: see :func:`stack`.

    Args:
        spec: shapes and slots.
        config: the options of the method.
        weights: path -> frozen weight [N, K] of each slot, in the dtype and on the device that the factors are to
            have; LoRA-XS takes its SVD. Empty tensors suffice for a group whose factors are about to be loaded.

    Attributes:
        floor: the factors are never cast to a narrower dtype together with their model.
        starts_at_zero: names of the factors that start at zero, so that the update does.
        rank_weights: with that option, the coefficients of the rank-1 terms; else None.
        channel_scale: with that option, a factor for each output of each adapted matrix, side by side in the order of
            the slots; else None.
    """

    starts_at_zero: tuple[str, ...] = ()

    def __init__(self, spec: GroupSpec, config: MethodConfig, weights: Mapping[str, Tensor]):
        super().__init__()
        # the rank that the factor at zero is summed over
        rank = spec.rank[1 if spec.zero == "v" else 0]
        self.spec, self.scale = spec, float(config.scale) / (rank**0.5 if config.rank_stabilized else 1)
        self.rank_dropout = config.rank_dropout
        self._optional = {
            "rank_weights": self._terms() if getattr(config, "rank_weights", False) else None,
            "channel_scale": (sum(self._channels()),) if getattr(config, "channel_scale", False) else None,
        }
        self.slots = {slot.site.path: slot for slot in spec.slots}
        weight = weights[spec.slots[0].site.path]
        self._like = {"device": weight.device, "dtype": weight.dtype}
        self.floor = floor(weight.dtype)
        for name, shape in self._optional.items():
            self.register_parameter(name, None if shape is None else self._parameter(*shape))
        self._reset_optional()

    def _parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, **self._like))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Group":
        return super()._apply(at_least(fn, self.floor), recurse)

    def reset_parameters(self) -> None:
        """Initialise the factors as those of a new group, so that the update is zero: after ``to_empty``, say."""
        raise NotImplementedError

    @torch.no_grad()
    def _reset_optional(self) -> None:
        for name in self._optional:
            if (t := getattr(self, name)) is not None:
                t.fill_(1.0)

    def _terms(self) -> tuple[int, ...]:
        """the shape of rank_weights"""
        raise NotImplementedError

    def _channels(self) -> list[int]:
        """how many entries of channel_scale each slot has"""
        return [len(slot.site.chosen) * slot.site.width for slot in self.spec.slots]

    @property
    def drops(self) -> bool:
        """Whether the next call of low_rank_pairs draws dropout masks."""
        return self.training and self.rank_dropout > 0

    def low_rank_pairs(
        self, backend: str | None = None, path: str | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Pair]:
        """The (down, up) of all Linears of the group at once, by path, or of one alone; differentiable in the factors.

        A stack of A adapters gives down [A, K, R] and up [A, R, N]; dimensions are counted from the last for that.

        Args:
            backend: of the group update, as for :func:`efft_kernels.group_update`.
            path: of the one Linear; None for all.
            dtype: that the Linears compute in. Wider factors are cast to it once for all Linears; None casts none.
        """
        pairs = self._pairs(backend, path, dtype)
        return pairs if self.channel_scale is None else self._channel_scaled(pairs, dtype)

    def _pairs(self, backend: str | None, path: str | None, dtype: torch.dtype | None) -> dict[str, Pair]:
        """The pairs before the scale of output channels."""
        raise NotImplementedError

    def _channel_scaled(self, pairs: dict[str, Pair], dtype: torch.dtype | None) -> dict[str, Pair]:
        """Adapter+ (arXiv 2406.06820): each column of up times a trained factor."""
        scaled = {}
        for slot, scale in zip(self.spec.slots, narrowed(self.channel_scale, dtype).split(self._channels(), -1)):
            site = slot.site
            if (pair := pairs.get(site.path)) is None:
                continue
            if site.chosen != site.parts:  # the other parts are zeros
                of_part = dict(zip(site.chosen, scale.split(site.width, -1)))
                other = torch.ones_like(next(iter(of_part.values())))
                scale = torch.cat([of_part.get(part, other) for part in site.parts], -1)
            scaled[site.path] = pair._replace(up=pair.up * scale.unsqueeze(-2))
        return scaled

    def _masked_terms(self, weights: Tensor | None, like: Tensor) -> Tensor | None:
        """Coefficients of rank-1 terms with a new dropout mask in training (MLAE, arXiv 2405.18897).

        Args:
            weights: the coefficients; None if all are 1, and so the result without dropout.
            like: of their shape.
        """
        if not (self.training and self.rank_dropout):
            return weights
        return drop(torch.ones_like(like) if weights is None else weights, self.rank_dropout)

    def _ones(self, name: str, like: Tensor) -> Tensor:
        """what stands for an optional factor that this group does not have"""
        return like.new_ones(self._terms() if name == "rank_weights" else sum(self._channels()))

    def pairs_without_dropout(self, backend: str | None = None, path: str | None = None) -> dict[str, Pair]:
        """As :meth:`low_rank_pairs` in eval mode and in the dtype of the factors, whatever mode the group is in.

        Autocast has no effect, so that a merge is not rounded to its dtype.
        """
        training = self.training
        try:
            with without_autocast(next(self.parameters()).device):
                return self.eval().low_rank_pairs(backend, path)
        finally:
            self.train(training)


def stack(groups: list[Group]) -> Group:
    """One group that gives the pairs of several adapters at once: each factor gets a leading dimension of adapters.

    The stack is differentiable in the factors it was made of. Adapters of lower rank than the others are padded with
    zeros, which changes no update; one without coefficients of rank-1 terms or scales of output channels has ones. The
    stack is a snapshot of the current factors; do not keep it.

    Args:
        groups: of one class and one set of slots; ranks and scales may differ, dropout may not.
    """
    first = groups[0]
    made = copy.copy(first)
    made.__dict__ = {**first.__dict__, "_parameters": {}, "_buffers": {}}
    names = {name: None for group in groups for name in (*group._parameters, *group._buffers) if name != "scale"}
    for name in names:
        found = [getattr(group, name) for group in groups]
        if (some := next((t for t in found if t is not None), None)) is None:
            made.__dict__[name] = None
            continue
        found = [group._ones(name, some) if t is None else t for group, t in zip(groups, found)]
        made.__dict__[name] = _padded_stack(found)
    scales = [group.scale for group in groups]
    if len({scale if isinstance(scale, float) else id(scale) for scale in scales}) > 1 or isinstance(scales[0], Tensor):
        # float32: a scale is not rounded to the dtype of the factors
        like = next(first.parameters())
        wide = torch.promote_types(like.dtype, torch.float32)
        scales = [torch.as_tensor(scale, dtype=wide, device=like.device) for scale in scales]
        made.__dict__["scale"] = torch.stack(scales).view(-1, 1, 1, 1)
    return made


def _padded_stack(tensors: list[Tensor]) -> Tensor:
    sizes = [max(dims) for dims in zip(*(t.shape for t in tensors))]

    def missing(t: Tensor) -> list[int]:
        return [n for size, own in zip(reversed(sizes), reversed(t.shape)) for n in (0, size - own)]

    return torch.stack([t if list(t.shape) == sizes else F.pad(t, missing(t)) for t in tensors])


def k_contiguous(factor: Tensor) -> bool:
    """whether down must have K contiguous, because the GPU kernels would otherwise copy it at every call"""
    return factor.device.type != "cpu"


def drop(t: Tensor, dropout: float) -> Tensor:
    # F.dropout is several operations on a CPU; this is one on every device
    return torch.native_dropout(t, dropout, True)[0]
