"""What one Linear adds, the base of all groups of trained factors, and several adapters in one group."""

import copy
from collections.abc import Callable, Container, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configs import GroupSpec, MethodConfig
from .dora import row_norms
from .precision import LOW, at_least, floor, narrowed, without_autocast
from .wrappers import refuse_sharded


class Pair(NamedTuple):
    """What one Linear adds: (x @ down) @ up, with ``dropout`` on x @ down while training.

    With a ``magnitude`` its outputs are scaled as well: see dora.py.
    """

    down: Tensor  # [K, R]; on a GPU with K contiguous, as its kernels read it
    up: Tensor  # [R, N]
    dropout: float = 0.0
    magnitude: Tensor | None = None  # [N], 0 for the outputs that are not adapted

    def of(self, columns: slice) -> "Pair":
        """The pair of some of the outputs."""
        magnitude = None if self.magnitude is None else self.magnitude[..., columns]
        return self.changed(self.up[..., columns], magnitude)

    def changed(self, up: Tensor, magnitude: Tensor | None) -> "Pair":
        """The pair with another up and magnitude: torch 2.11 cannot compile _replace."""
        return Pair(self.down, up, self.dropout, magnitude)


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
        magnitude: with ``dora``, that of each output, in the same order; else None.

    Raises:
        ValueError: ``dora`` with factors that are narrower than float32, whose steps a magnitude would not notice.
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
        self.register_parameter("magnitude", self._norms(weights) if getattr(config, "dora", False) else None)

    def _norms(self, weights: Mapping[str, Tensor]) -> nn.Parameter:
        """the norms of the rows of the adapted matrices"""
        if self._like["dtype"] in LOW:
            raise ValueError(f"dora=True needs factor_dtype=torch.float32 or wider, got {self._like['dtype']}")
        magnitude = self._parameter(sum(self._channels()))
        for slot, mine in zip(self.spec.slots, magnitude.detach().split(self._channels())):
            if (weight := weights[slot.site.path]).numel():
                parts = zip(slot.site.parts, row_norms(weight).split(slot.site.width))
                mine.copy_(torch.cat([norms for part, norms in parts if part in slot.site.chosen]))
        return magnitude

    def _parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, **self._like))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Group":
        return super()._apply(at_least(fn, self.floor), recurse)

    def reset_parameters(self) -> None:
        """Initialise the factors as those of a new group, so that the update is zero: after ``to_empty``, say.

        Raises:
            RuntimeError: factors that come from the weights of the model, which a group does not hold.
        """
        if self.magnitude is not None:
            raise RuntimeError(
                "the magnitudes of dora=True cannot be initialised without the weights they come from: load a state "
                "dict or an adapter file, or inject a model that has its weights"
            )
        self._reset()

    def _reset(self) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def _reset_optional(self) -> None:
        for name in self._optional:
            if (t := getattr(self, name)) is not None:
                t.fill_(1.0)

    def extra_repr(self) -> str:
        return f"[{self.spec.K}, {self.spec.N}], rank={self.spec.rank}, of {len(self.slots)} Linears"

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
        if self.channel_scale is not None:  # Adapter+ (arXiv 2406.06820)
            of = self._of_outputs(narrowed(self.channel_scale, dtype), 1.0, pairs)
            pairs = {
                path: pair.changed(pair.up * of[path].unsqueeze(-2), pair.magnitude) for path, pair in pairs.items()
            }
        if self.magnitude is not None:
            of = self._of_outputs(self.magnitude, 0.0, pairs)
            pairs = {path: pair.changed(pair.up, of[path]) for path, pair in pairs.items()}
        return pairs

    def _pairs(self, backend: str | None, path: str | None, dtype: torch.dtype | None) -> dict[str, Pair]:
        """The pairs before the scale of output channels."""
        raise NotImplementedError

    def _of_outputs(self, values: Tensor, other: float, paths: Container[str]) -> dict[str, Tensor]:
        """values of all outputs of these Linears [..., N], with ``other`` for those of parts that are not adapted"""
        found = {}
        for slot, own in zip(self.spec.slots, values.split(self._channels(), -1)):
            site = slot.site
            if site.path not in paths:
                continue
            if site.chosen != site.parts:
                of_part = dict(zip(site.chosen, own.split(site.width, -1)))
                missing = torch.full_like(next(iter(of_part.values())), other)
                own = torch.cat([of_part.get(part, missing) for part in site.parts], -1)
            found[site.path] = own
        return found

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
        """what stands for an optional factor that this group does not have; a magnitude of 0 scales nothing"""
        if name == "magnitude":
            return like.new_zeros(sum(self._channels()))
        return like.new_ones(self._terms() if name == "rank_weights" else sum(self._channels()))

    def pairs_without_dropout(self, backend: str | None = None, path: str | None = None) -> dict[str, Pair]:
        """As :meth:`low_rank_pairs` in eval mode and in the dtype of the factors, whatever mode the group is in.

        Autocast has no effect, so that a merge is not rounded to its dtype. A ValueError refuses sharded factors.
        """
        refuse_sharded(self, "an update")
        still = object.__new__(type(self))  # other threads may train with this one meanwhile
        vars(still).update(vars(self), training=False)
        with without_autocast(next(self.parameters()).device):
            return still.low_rank_pairs(backend, path)


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
