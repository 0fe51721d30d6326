"""Groups of the methods that share no tensor between layers: LoRA, LoRA-XS, VeRA."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import low_rank
from .configs import GroupSpec, MethodConfig, Slot
from .low_rank import Group, Pair
from .precision import narrowed


class LoRAGroup(Group):
    """a [L, m, K, R], b [L, m, R, N]: L Linears of one kind, m adapted matrices in each."""

    starts_at_zero = ("b",)

    def __init__(self, spec: GroupSpec, config: MethodConfig, weights: Mapping[str, Tensor]):
        super().__init__(spec, config, weights)
        self.init = getattr(config, "init", "xavier")
        self.chosen = [i for i, part in enumerate(spec.slots[0].parts) if part.core is not None]
        self.index = {path: i for i, path in enumerate(self.slots)}
        self.make(len(spec.slots), self.chosen, weights)

    def make(self, L: int, chosen: list[int], weights: Mapping[str, Tensor]) -> None:
        """Create and initialise the factors; ``chosen`` are the adapted parts of each Linear."""
        m, R = len(chosen), self.spec.rank[0]
        self.a, self.b = self._parameter(L, m, self.spec.K, R), self._parameter(L, m, R, self.spec.N)
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        if self.init == "released":  # the default of nn.Linear, which LoRA's own code keeps
            nn.init.uniform_(self.a, -(bound := self.spec.K**-0.5), bound)
        else:
            for matrix in self.a.flatten(0, 1):
                nn.init.xavier_uniform_(matrix)
        nn.init.zeros_(self.b)
        self._reset_optional()

    def _terms(self) -> tuple[int, ...]:
        chosen = sum(part.core is not None for part in self.spec.slots[0].parts)
        return len(self.spec.slots), chosen, self.spec.rank[0]

    def factors(self, rows: slice) -> tuple[Tensor, Tensor]:  # [l, m, K, R], [l, m, R, N]
        """a and b of some of the Linears"""
        return _rows(self.a, rows), _rows(self.b, rows)

    def _pairs(self, backend: str | None, path: str | None, dtype: torch.dtype | None) -> dict[str, Pair]:
        rows, slots = self._rows_of(path)
        a, b = self.factors(rows)
        weights = None if self.rank_weights is None else self.rank_weights[..., rows, :, :]
        if (weights := self._masked_terms(weights, b[..., 0])) is not None:
            b = b * weights.unsqueeze(-1)
        a, b = narrowed(a, dtype), narrowed(self._scaled(b), dtype)
        if low_rank.k_contiguous(a):
            down = a.mT.contiguous().flatten(-3, -2).mT  # [l, K, m R]
        else:
            down = a.transpose(-3, -2).flatten(-2)
        pairs = zip(down.unbind(-3), self._beside_zeros(b).unbind(-3))
        return {slot.site.path: Pair(*pair) for slot, pair in zip(slots, pairs)}

    def _scaled(self, b: Tensor) -> Tensor:
        """b times the scale, which a stack has one of for each adapter"""
        if isinstance(self.scale, Tensor):
            return (b * self.scale.unsqueeze(-1)).to(b.dtype)
        return b if self.scale == 1.0 else b * self.scale

    def _beside_zeros(self, b: Tensor) -> Tensor:  # [l, m, R, N] -> [l, m R, parts N]
        """each of the m matrices in its own rows, and in the columns of its part of the Linear"""
        N, last = self.spec.N, len(self.spec.slots[0].parts) - 1
        if not last:
            return b.squeeze(-3)
        parts = zip(self.chosen, b.unbind(-3))
        return torch.cat([F.pad(part, (column * N, (last - column) * N)) for column, part in parts], -2)

    def _rows_of(self, path: str | None) -> tuple[slice, tuple[Slot, ...]]:
        """rows of the factors, and slots, of all Linears or of one"""
        if path is None:
            return slice(None), self.spec.slots
        first = self.index[path]
        return slice(first, first + 1), self.spec.slots[first : first + 1]


class LoRAXSGroup(LoRAGroup):
    """sigma [L, m, R, R] trained; a = left and v = right singular vectors, a times the singular values, frozen."""

    starts_at_zero = ("sigma",)

    def make(self, L: int, chosen: list[int], weights: Mapping[str, Tensor]) -> None:
        R, N, parts = self.spec.rank[0], self.spec.N, len(self.spec.slots[0].parts)
        a = torch.empty(L, len(chosen), self.spec.K, R, **self._like)
        v = torch.empty(L, len(chosen), R, N, **self._like)
        for path, i in self.index.items():
            for j, part in enumerate(chosen if weights[path].numel() else ()):
                matrix = weights[path].detach().unflatten(0, (parts, N))[part].mT  # [K, N], y = x W
                matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
                left, values, right = torch.linalg.svd(matrix, full_matrices=False)
                a[i, j], v[i, j] = left[:, :R] * values[:R], right[:R]
        self.register_buffer("a", a)
        self.register_buffer("v", v)
        self.sigma = self._parameter(L, len(chosen), R, R)
        nn.init.zeros_(self.sigma)

    def reset_parameters(self) -> None:
        """Refuse: a and v come from the weights of the model, which a group does not hold.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "the factors of LoRA-XS cannot be initialised without the weights they come from: load a state dict or an "
            "adapter file, or inject a model that has its weights"
        )

    def factors(self, rows: slice) -> tuple[Tensor, Tensor]:
        return _rows(self.a, rows), _rows(self.sigma, rows) @ _rows(self.v, rows)


class VeRAGroup(LoRAGroup):
    """d [L, m, R] and b [L, m, N] trained; u [K, R] and v [R, N] frozen and random, shared by all Linears."""

    def make(self, L: int, chosen: list[int], weights: Mapping[str, Tensor]) -> None:
        K, N, R = self.spec.K, self.spec.N, self.spec.rank[0]
        self.register_buffer("u", torch.empty(K, R, **self._like))
        self.register_buffer("v", torch.empty(R, N, **self._like))
        self.d, self.b = self._parameter(L, len(chosen), R), self._parameter(L, len(chosen), N)
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        nn.init.kaiming_uniform_(self.u)
        nn.init.kaiming_uniform_(self.v)
        nn.init.constant_(self.d, 0.1)
        nn.init.zeros_(self.b)

    def _pairs(self, backend: str | None, path: str | None, dtype: torch.dtype | None) -> dict[str, Pair]:
        rows, slots = self._rows_of(path)
        d, b = self.d[..., rows, :, :], self.b[..., rows, :, :].unsqueeze(-2)
        d = self._masked_terms(d, d).unsqueeze(-1)
        u, v, d, b = (narrowed(t, dtype) for t in (self.u, self.v, d, b))
        up = self._scaled(d * (v if v.dim() == 2 else v[:, None, None]) * b)  # [l, m, R, N]
        down = u.mT.contiguous().mT if low_rank.k_contiguous(u) else u
        return {slot.site.path: Pair(down, row) for slot, row in zip(slots, self._beside_zeros(up).unbind(-3))}

    def _beside_zeros(self, up: Tensor) -> Tensor:  # [l, m, R, N] -> [l, R, parts N]
        """all matrices of a Linear use the same x u, so they share rows"""
        of_part = dict(zip(self.chosen, up.unbind(-3)))
        zeros = None if len(of_part) == len(self.spec.slots[0].parts) else torch.zeros_like(up.select(-3, 0))
        return torch.cat([of_part.get(part, zeros) for part in range(len(self.spec.slots[0].parts))], -1)


def _rows(t: Tensor, rows: slice) -> Tensor:  # [..., L, m, K, R]
    """some of the Linears"""
    return t[..., rows, :, :, :]
