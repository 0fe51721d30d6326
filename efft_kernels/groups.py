"""Groups: the trained factors of a set of Linears, and the (down, up) that each Linear gets from them.

Every method computes y = x W + b + (x @ down) @ up for each Linear and differs only in where down and up come from. A
config (configs.py) says which matrices form a group; the classes here hold the factors of one group.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .columns import ColumnPlan, plan_columns
from .configs import EFFTConfig, FacTConfig, GroupSpec, LoRAConfig, LoRAXSConfig, MethodConfig, Slot, VeRAConfig
from .ops import group_update
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
    """

    def __init__(self, spec: GroupSpec, config: MethodConfig, weights: Mapping[str, Tensor]):
        super().__init__()
        self.spec, self.scale = spec, float(config.scale)
        self.slots = {slot.site.path: slot for slot in spec.slots}
        weight = weights[spec.slots[0].site.path]
        self._like = {"device": weight.device, "dtype": weight.dtype}
        self.floor = floor(weight.dtype)

    def _parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, **self._like))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Group":
        return super()._apply(at_least(fn, self.floor), recurse)

    def reset_parameters(self) -> None:
        """Initialise the factors as those of a new group, so that the update is zero: after ``to_empty``, say."""
        raise NotImplementedError

    @property
    def drops(self) -> bool:
        """Whether the next call of low_rank_pairs draws dropout masks."""
        return False

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
        raise NotImplementedError

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
    zeros, which changes no update. The stack is a snapshot of the current factors; do not keep it.

    Args:
        groups: of one class and one set of slots; ranks and scales may differ, dropout may not.
    """
    first = groups[0]
    made = copy.copy(first)
    made.__dict__ = {**first.__dict__, "_parameters": {}, "_buffers": {}}
    names = {name: None for group in groups for name in (*group._parameters, *group._buffers) if name != "scale"}
    for name in names:
        made.__dict__[name] = _padded_stack([getattr(group, name) for group in groups])
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


class EFFTGroup(Group):
    """u [K, P], sigma [S, P, Q], v [Q, N], and scale [] if it is trained."""

    def __init__(self, spec: GroupSpec, config: MethodConfig, weights: Mapping[str, Tensor]):
        super().__init__(spec, config, weights)
        P, Q = spec.rank
        self.factor_dropout = getattr(config, "factor_dropout", 0.0)
        self.activation_dropout = getattr(config, "activation_dropout", 0.0)
        self._plans: dict[tuple[str | None, bool], tuple[ColumnPlan, ...]] = {}
        self.u = self._parameter(spec.K, P)
        self._make_cores(spec.cores, P, Q)
        self.v = self._parameter(Q, spec.N)
        self.initial_scale = self.scale
        if getattr(config, "trainable_scale", False):
            self.scale = self._parameter()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self._reset_cores()
        for name in ("u", "v"):
            factor = getattr(self, name)
            nn.init.zeros_(factor) if name == self.spec.zero else nn.init.xavier_uniform_(factor)
        if isinstance(self.scale, Tensor):
            self.scale.fill_(self.initial_scale)

    def _make_cores(self, S: int, P: int, Q: int) -> None:
        self.sigma = self._parameter(S, P, Q)

    def _reset_cores(self) -> None:
        # slice by slice: on the whole tensor Xavier would read the trailing dimension as a receptive field
        for core in self.sigma:
            nn.init.xavier_uniform_(core)

    def cores(self) -> Tensor:  # [S, P, Q]
        return self.sigma

    @property
    def drops(self) -> bool:
        return self.training and self.factor_dropout > 0

    def low_rank_pairs(
        self, backend: str | None = None, path: str | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Pair]:
        (plan,) = self._column_plans(path)
        return self._fold(plan, *self._factors(dtype), backend)

    def _factors(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        """u, the cores times a trained scale, v"""
        sigma = self.cores()
        if isinstance(self.scale, Tensor):
            sigma = (sigma * self.scale).to(sigma.dtype)
        return narrowed(self.u, dtype), narrowed(sigma, dtype), narrowed(self.v, dtype)

    def _column_plans(self, path: str | None) -> tuple[ColumnPlan, ...]:
        key = path, self.drops
        plans = self._plans.get(key)
        if plans is None:
            plans = self._make_plans(list(self.slots.values()) if path is None else [self.slots[path]])
            if not torch.compiler.is_compiling():
                self._plans[key] = plans
        return plans

    def _make_plans(self, slots: list[Slot]) -> tuple[ColumnPlan, ...]:
        return (plan_columns(slots, self.spec.N, masked=self.drops),)

    def _fold(self, plan: ColumnPlan, u: Tensor, sigma: Tensor, v: Tensor, backend: str | None) -> dict[str, Pair]:
        """(u, sigma v) for each slot; (sigma v).T and u.T for a transposed one, which needs no second launch."""
        scale = 1.0 if isinstance(self.scale, Tensor) else self.scale
        if self.drops:
            u, pieces = _masked(plan, u, sigma, v, scale, self.factor_dropout)
        else:
            u, pieces = u.unsqueeze(-3), _cut(plan, _updates(_select(sigma, plan.cores), v, scale, backend))
        downs = _downs(plan, u)
        pairs = {}
        for slot, number, takes in zip(plan.slots, plan.downs, plan.takes):
            down = downs[number]
            up = pieces[takes[0]] if len(takes) == 1 else torch.cat([pieces[i] for i in takes], -1)
            if slot.transposed:
                down, up = up.mT, down.mT
            pairs[slot.site.path] = Pair(down, up, self.activation_dropout)
        return pairs


class FacTGroup(EFFTGroup):
    """As EFFT with d x d slices, except for fc2: its slices are stacked, so Sigma is folded into U instead of V.

    With x = [x_0 ... x_3], sum_i x_i U Sigma_i V has down = [U Sigma_0; ...; U Sigma_3] and up = V: a transposed slot
    of the group (V.T, Sigma.T, U.T).
    """

    def low_rank_pairs(
        self, backend: str | None = None, path: str | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Pair]:
        u, sigma, v = self._factors(dtype)
        pairs = {}
        for plan in self._column_plans(path):
            if plan.slots[0].transposed:
                pairs |= self._fold(plan, v.mT, sigma.mT, u.mT, backend)
            else:
                pairs |= self._fold(plan, u, sigma, v, backend)
        return pairs

    def _make_plans(self, slots: list[Slot]) -> tuple[ColumnPlan, ...]:
        sides = [slot for slot in slots if not slot.transposed], [slot for slot in slots if slot.transposed]
        return tuple(plan_columns(side, self.spec.N, masked=False) for side in sides if side)


class FacTTuckerGroup(FacTGroup):
    """Sigma_s = sum_k p[s, k] c[k], with c [r, r, r] and p [S, r]."""

    def _make_cores(self, S: int, P: int, Q: int) -> None:
        self.c, self.p = self._parameter(P, P, Q), self._parameter(S, P)

    def _reset_cores(self) -> None:
        for core in self.c:
            nn.init.xavier_uniform_(core)
        nn.init.xavier_uniform_(self.p)

    def cores(self) -> Tensor:
        return (self.p @ self.c.flatten(-2)).unflatten(-1, self.c.shape[-2:])


class LoRAGroup(Group):
    """a [L, m, K, R], b [L, m, R, N]: L Linears of one kind, m adapted matrices in each."""

    def __init__(self, spec: GroupSpec, config: MethodConfig, weights: Mapping[str, Tensor]):
        super().__init__(spec, config, weights)
        self.chosen = [i for i, part in enumerate(spec.slots[0].parts) if part.core is not None]
        self.index = {path: i for i, path in enumerate(self.slots)}
        self.make(len(spec.slots), self.chosen, weights)

    def make(self, L: int, chosen: list[int], weights: Mapping[str, Tensor]) -> None:
        """Create and initialise the factors; ``chosen`` are the adapted parts of each Linear."""
        m, R = len(chosen), self.spec.rank[0]
        self.a, self.b = self._parameter(L, m, self.spec.K, R), self._parameter(L, m, R, self.spec.N)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for matrix in self.a.flatten(0, 1):
            nn.init.xavier_uniform_(matrix)
        nn.init.zeros_(self.b)

    def factors(self, rows: slice) -> tuple[Tensor, Tensor]:  # [l, m, K, R], [l, m, R, N]
        """a and b of some of the Linears"""
        return _rows(self.a, rows), _rows(self.b, rows)

    def low_rank_pairs(
        self, backend: str | None = None, path: str | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Pair]:
        rows, slots = self._rows_of(path)
        a, b = self.factors(rows)
        a, b = narrowed(a, dtype), narrowed(self._scaled(b), dtype)
        if _k_contiguous(a):
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
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.u)
        nn.init.kaiming_uniform_(self.v)
        nn.init.constant_(self.d, 0.1)
        nn.init.zeros_(self.b)

    def low_rank_pairs(
        self, backend: str | None = None, path: str | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Pair]:
        rows, slots = self._rows_of(path)
        d, b = (t[..., rows, :, :].unsqueeze(dim) for t, dim in ((self.d, -1), (self.b, -2)))
        u, v, d, b = (narrowed(t, dtype) for t in (self.u, self.v, d, b))
        up = self._scaled(d * (v if v.dim() == 2 else v[:, None, None]) * b)  # [l, m, R, N]
        down = u.mT.contiguous().mT if _k_contiguous(u) else u
        return {slot.site.path: Pair(down, row) for slot, row in zip(slots, self._beside_zeros(up).unbind(-3))}

    def _beside_zeros(self, up: Tensor) -> Tensor:  # [l, m, R, N] -> [l, R, parts N]
        """all matrices of a Linear use the same x u, so they share rows"""
        of_part = dict(zip(self.chosen, up.unbind(-3)))
        zeros = None if len(of_part) == len(self.spec.slots[0].parts) else torch.zeros_like(up.select(-3, 0))
        return torch.cat([of_part.get(part, zeros) for part in range(len(self.spec.slots[0].parts))], -1)


def _fact_group(spec: GroupSpec, config: FacTConfig, weights: Mapping[str, Tensor]) -> FacTGroup:
    return (FacTGroup if config.variant == "tt" else FacTTuckerGroup)(spec, config, weights)


GROUPS: dict[type[MethodConfig], Callable[[GroupSpec, MethodConfig, Mapping[str, Tensor]], Group]] = {
    EFFTConfig: EFFTGroup,
    FacTConfig: _fact_group,
    LoRAConfig: LoRAGroup,
    VeRAConfig: VeRAGroup,
    LoRAXSConfig: LoRAXSGroup,
}


def make_group(spec: GroupSpec, config: MethodConfig, weights: Mapping[str, Tensor]) -> Group:
    """The group of this config's method, with new factors. Arguments as :class:`Group`."""
    method = next(cls for cls in type(config).__mro__ if cls in GROUPS)
    return GROUPS[method](spec, config, weights)


def _k_contiguous(factor: Tensor) -> bool:
    """whether down must have K contiguous, because the GPU kernels would otherwise copy it at every call"""
    return factor.device.type != "cpu"


def _rows(t: Tensor, rows: slice) -> Tensor:  # [..., L, m, K, R]
    """some of the Linears"""
    return t[..., rows, :, :, :]


def _updates(sigma: Tensor, v: Tensor, scale: float, backend: str | None) -> Tensor:
    """scale * sigma[s] @ v, the slices side by side: [P, S N] from sigma [S, P, Q] and v [Q, N]"""
    if sigma.dim() == 3:
        return group_update(sigma, v, scale, backend=backend).transpose(0, 1).flatten(1)  # a view
    # adapters share no v: one product for each of them, in one batch
    S, P = sigma.shape[1:3]
    return torch.bmm(sigma.transpose(1, 2).flatten(1, 2) * scale, v).unflatten(1, (P, S)).flatten(2)


def _masked(
    plan: ColumnPlan, u: Tensor, sigma: Tensor, v: Tensor, scale: float, dropout: float
) -> tuple[Tensor, list[Tensor]]:
    """u [calls, K, P] and the pieces of the updates, with separate dropout masks of u and v for each call.

    v then differs from call to call, so the update is a batch of products instead of one group update.
    """
    n, S = plan.cores_per_draw, sigma.shape[-3]
    draws, repeats = len(plan.cores) // n, len(plan.cores) // S
    if scale != 1.0:
        sigma = sigma * scale
    if plan.cores == tuple(range(S)) * repeats:
        sigma = _drop(_times(sigma, repeats, -4), dropout).flatten(-4, -3)
    else:
        sigma = _drop(_select(sigma, plan.cores), dropout)
    v = _drop(_times(v, draws), dropout)
    ups = torch.matmul(sigma.unflatten(-3, (draws, n)).flatten(-3, -2), v)  # [draws, n P, N]
    u = _drop(_times(u, plan.calls), dropout)
    if plan.piece_per_core and n == 1:
        return u, _repeated(plan, ups.unbind(-3))
    return u, _cut(plan, ups.unflatten(-2, (n, -1)).movedim(-2, -4).flatten(-3))  # a copy, [P, draws n N]


def _drop(t: Tensor, dropout: float) -> Tensor:
    # F.dropout is several operations on a CPU; this is one on every device
    return torch.native_dropout(t, dropout, True)[0]


def _cut(plan: ColumnPlan, matrix: Tensor) -> list[Tensor]:
    """the pieces that ``plan.takes`` counts, out of the updates side by side"""
    return _repeated(plan, matrix.split_with_sizes(plan.widths, -1) if len(plan.widths) > 1 else (matrix,))


def _repeated(plan: ColumnPlan, cut: Sequence[Tensor]) -> list[Tensor]:
    """each piece as often as it is used, then the blocks of zeros"""
    pieces = []
    for piece, times in zip(cut, plan.uses):
        if times == 1:
            pieces.append(piece)
        elif times > 1:
            pieces += _times(piece, times).unbind(-3)  # its gradients come back as one stack and one sum
    for width in plan.zeros:
        pieces.append(cut[0].new_zeros(*cut[0].shape[:-1], width))
    return pieces


def _downs(plan: ColumnPlan, u: Tensor) -> list[Tensor]:
    """each value of u [calls, K, P], as many times as slots share it, in the order that ``plan.downs`` counts in"""
    turn = _k_contiguous(u)
    parts = u.split_with_sizes([count for count, _ in plan.shares], -3) if len(plan.shares) > 1 else (u,)
    downs = []
    for part, (count, size) in zip(parts, plan.shares):
        if turn:
            part = part.mT
            if count == 1 or size == 1:  # otherwise flatten copies
                part = part.contiguous()
        part = _times(part, size).flatten(-4, -3)
        downs += (part.mT if turn else part).unbind(-3)
    return downs


def _select(sigma: Tensor, cores: tuple[int, ...]) -> Tensor:
    """sigma[cores]; a range is a view, and no case has a scatter for its gradient"""
    S, n = sigma.shape[-3], len(cores)
    if cores == tuple(range(cores[0], cores[0] + n)):
        return sigma if n == S else sigma[..., cores[0] : cores[0] + n, :, :]
    return torch.stack([sigma[..., core, :, :] for core in cores], -3)


def _times(t: Tensor, n: int, dim: int = -3) -> Tensor:
    """t, n times along a new dimension"""
    t = t.unsqueeze(dim)
    return t.expand(*t.shape[:dim], n, *t.shape[dim + 1 :])
