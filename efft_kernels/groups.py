"""Groups: the trained factors of a set of Linears, and the (down, up) that each Linear gets from them.

Every method computes y = x W + b + (x @ down) @ up for each Linear and differs only in where down and up come from. A
config (configs.py) says which matrices form a group; the classes here and in per_matrix.py hold the factors of one
group.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from . import low_rank
from .columns import ColumnPlan, plan_columns
from .configs import EFFTConfig, FacTConfig, GroupSpec, LoRAConfig, LoRAXSConfig, MethodConfig, Slot, VeRAConfig
from .low_rank import Group, Pair, drop
from .ops import group_update
from .per_matrix import LoRAGroup, LoRAXSGroup, VeRAGroup
from .precision import narrowed


class EFFTGroup(Group):
    """u [K, P], sigma [S, P, Q], v [Q, N], and scale [] if it is trained."""

    def __init__(self, spec: GroupSpec, config: MethodConfig, weights: Mapping[str, Tensor]):
        super().__init__(spec, config, weights)
        self.init, self.starts_at_zero = getattr(config, "init", "xavier"), (spec.zero,)
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
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        self._reset_cores()
        for name in ("u", "v"):
            factor = getattr(self, name)
            nn.init.zeros_(factor) if name == self.spec.zero else self._reset_outer(factor)
        self._reset_optional()
        if isinstance(self.scale, Tensor):
            self.scale.fill_(self.initial_scale)

    def _make_cores(self, S: int, P: int, Q: int) -> None:
        self.sigma = self._parameter(S, P, Q)

    def _reset_outer(self, factor: Tensor) -> None:
        nn.init.xavier_uniform_(factor)

    def _reset_cores(self) -> None:
        if self.init == "released":
            nn.init.uniform_(self.sigma, -(bound := released_bound(self.spec)), bound)
            return
        # slice by slice: on the whole tensor Xavier would read the trailing dimension as a receptive field
        for core in self.sigma:
            nn.init.xavier_uniform_(core)

    def cores(self) -> Tensor:  # [S, P, Q]
        return self.sigma

    def _terms(self) -> tuple[int, ...]:
        return self.spec.cores, self.spec.rank[1]

    @property
    def drops(self) -> bool:
        return self._drops_entries or super().drops

    @property
    def _drops_entries(self) -> bool:
        return self.training and self.factor_dropout > 0

    def _pairs(self, backend: str | None, path: str | None, dtype: torch.dtype | None) -> dict[str, Pair]:
        (plan,) = self._column_plans(path)
        return self._fold(plan, *self._factors(dtype), backend)

    def _factors(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        """u, the cores times a trained scale and the coefficients of their rank-1 terms, v"""
        sigma = self.cores()
        if (weights := self._masked_terms(self.rank_weights, sigma[..., 0, :])) is not None:
            sigma = sigma * weights.unsqueeze(-2)
        if isinstance(self.scale, Tensor):
            sigma = (sigma * self.scale).to(sigma.dtype)
        return narrowed(self.u, dtype), narrowed(sigma, dtype), narrowed(self.v, dtype)

    def _column_plans(self, path: str | None) -> tuple[ColumnPlan, ...]:
        key = path, self._drops_entries
        # a graph must not depend on what an eager forward has cached since
        plans = None if torch.compiler.is_compiling() else self._plans.get(key)
        if plans is None:
            plans = self._make_plans(list(self.slots.values()) if path is None else [self.slots[path]])
            if not torch.compiler.is_compiling():
                self._plans[key] = plans
        return plans

    def _make_plans(self, slots: list[Slot]) -> tuple[ColumnPlan, ...]:
        return (plan_columns(slots, self.spec.N, masked=self._drops_entries),)

    def _fold(self, plan: ColumnPlan, u: Tensor, sigma: Tensor, v: Tensor, backend: str | None) -> dict[str, Pair]:
        """(u, sigma v) for each slot; (sigma v).T and u.T for a transposed one, which needs no second launch."""
        scale = 1.0 if isinstance(self.scale, Tensor) else self.scale
        if self._drops_entries:
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

    def _reset_outer(self, factor: Tensor) -> None:
        if self.init == "released":  # the default of nn.Linear(d, r)
            nn.init.uniform_(factor, -(bound := self.spec.K**-0.5), bound)
        else:
            super()._reset_outer(factor)

    def _reset_cores(self) -> None:
        super()._reset_cores()
        if self.init == "released":  # nn.Linear(r, r) for each matrix, (r, 4 r) for fc1, (4 r, r) for fc2
            for slot in self.spec.slots:
                fan = self.spec.rank[0] * (len(slot.parts) if slot.transposed else 1)
                for core in slot.cores:
                    nn.init.uniform_(self.sigma[core], -(bound := fan**-0.5), bound)

    def _pairs(self, backend: str | None, path: str | None, dtype: torch.dtype | None) -> dict[str, Pair]:
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
        if self.init == "released":  # Xavier on the whole tensor
            nn.init.xavier_uniform_(self.c)
        else:
            for core in self.c:
                nn.init.xavier_uniform_(core)
        nn.init.xavier_uniform_(self.p)

    def cores(self) -> Tensor:
        return (self.p @ self.c.flatten(-2)).unflatten(-1, self.c.shape[-2:])


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


def released_bound(spec: GroupSpec) -> float:
    """The bound of the uniform distribution that the released code of EFFT draws its cores from.

    It applies Xavier to the tensor of all cores, whose last two dimensions are then read as fans and receptive field:
    [P, Q, n] in a ViT, with n = 4 cores for attention and 2 for the FFN of all blocks together, and [n, P, Q] in a
    Swin, whose FFN has a core for each block of a stage. EFFT1, of which no code was released, has n = 3 here.
    """
    P, Q = spec.rank
    kind = spec.name.rpartition("_")[2]
    n = {"attn": 4, "ffn": 2}.get(kind, 3)
    if not spec.name.startswith("stage"):
        return (6 / (n * (P + Q))) ** 0.5
    n = len({slot.site.block for slot in spec.slots}) if kind == "ffn" else n
    return (6 / (P * Q + n * Q)) ** 0.5


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
        sigma = drop(_times(sigma, repeats, -4), dropout).flatten(-4, -3)
    else:
        sigma = drop(_select(sigma, plan.cores), dropout)
    v = drop(_times(v, draws), dropout)
    ups = torch.matmul(sigma.unflatten(-3, (draws, n)).flatten(-3, -2), v)  # [draws, n P, N]
    u = drop(_times(u, plan.calls), dropout)
    if plan.piece_per_core and n == 1:
        return u, _repeated(plan, ups.unbind(-3))
    return u, _cut(plan, ups.unflatten(-2, (n, -1)).movedim(-2, -4).flatten(-3))  # a copy, [P, draws n N]


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
    turn = low_rank.k_contiguous(u)
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
