"""Groups: the trained factors of a set of Linears, and the (down, up) that each Linear gets from them."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configs import EFFTConfig, FacTConfig, GroupSpec, LoRAConfig, LoRAXSConfig, MethodConfig, Slot, VeRAConfig
from .ops import group_update


class Pair(NamedTuple):
    """What one Linear adds: (x @ down) @ up, with ``dropout`` on x @ down while training."""

    down: Tensor  # [K, R]
    up: Tensor  # [R, N]
    dropout: float = 0.0


class Group(nn.Module):
    """The trained factors of one group, or of that group in several adapters: see :func:`stack`.

    Args:
        spec: shapes and slots.
        config: the options of the method.
        weights: path -> frozen weight [N, K] of each slot, for device, dtype and the SVD of LoRA-XS. Empty tensors will
            do for a group whose factors are about to be loaded.
    """

    def __init__(self, spec: GroupSpec, config: MethodConfig, weights: Mapping[str, Tensor]):
        super().__init__()
        self.spec, self.scale = spec, float(config.scale)
        self.slots = {slot.site.path: slot for slot in spec.slots}
        weight = weights[spec.slots[0].site.path]
        self._like = {"device": weight.device, "dtype": weight.dtype}

    def _parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(*shape, **self._like))

    @property
    def drops(self) -> bool:
        """whether the next hand-out draws dropout masks"""
        return False

    def low_rank_pairs(self, slots: Iterable[Slot], backend: str | None) -> dict[str, Pair]:
        """path -> (down, up) of each slot, in one go; differentiable in the factors.

        Of a stack of A adapters: down [A, K, R], up [A, R, N]. Dimensions are counted from the last for that.
        """
        raise NotImplementedError


def stack(groups: list[Group]) -> Group:
    """One group that hands out the pairs of several adapters at once: each factor with a leading dimension of adapters.

    The stack is differentiable in the factors it was made of. Adapters of lower rank than the others get zeros beyond
    it, which changes no update. Not a module to keep: a look at the factors as they are now.

    Args:
        groups: of one kind and one set of slots; their ranks and scales may differ, options of dropout may not.
    """
    first = groups[0]
    made = copy.copy(first)
    made.__dict__ = {**first.__dict__, "_parameters": {}, "_buffers": {}}
    names = {name: None for group in groups for name in (*group._parameters, *group._buffers) if name != "scale"}
    for name in names:
        made.__dict__[name] = _stack([getattr(group, name) for group in groups])
    scales = [group.scale for group in groups]
    if len({scale if isinstance(scale, float) else id(scale) for scale in scales}) > 1 or isinstance(scales[0], Tensor):
        # float32: a scale is not rounded to the dtype of the factors
        like = next(first.parameters())
        wide = torch.promote_types(like.dtype, torch.float32)
        scales = [torch.as_tensor(scale, dtype=wide, device=like.device) for scale in scales]
        made.__dict__["scale"] = torch.stack(scales).view(-1, 1, 1, 1)
    return made


def _stack(tensors: list[Tensor]) -> Tensor:
    sizes = [max(dims) for dims in zip(*(t.shape for t in tensors))]
    missing = lambda t: [n for size, own in zip(reversed(sizes), reversed(t.shape)) for n in (0, size - own)]
    return torch.stack([t if list(t.shape) == sizes else F.pad(t, missing(t)) for t in tensors])


class EFFTGroup(Group):
    """u [K, P], sigma [S, P, Q], v [Q, N], and scale [] if it is trained."""

    def __init__(self, spec: GroupSpec, config: MethodConfig, weights: Mapping[str, Tensor]):
        super().__init__(spec, config, weights)
        P, Q = spec.rank
        self.factor_dropout = getattr(config, "factor_dropout", 0.0)
        self.activation_dropout = getattr(config, "activation_dropout", 0.0)
        self.u = self._parameter(spec.K, P)
        self._make_cores(spec.cores, P, Q)
        self.v = self._parameter(Q, spec.N)
        if getattr(config, "trainable_scale", False):
            self.scale = nn.Parameter(torch.tensor(self.scale, **self._like))
        with torch.no_grad():
            for name in ("u", "v"):
                factor = getattr(self, name)
                nn.init.zeros_(factor) if name == spec.zero else nn.init.xavier_uniform_(factor)

    def _make_cores(self, S: int, P: int, Q: int) -> None:
        self.sigma = self._parameter(S, P, Q)
        # slice by slice: on the whole tensor Xavier would read the trailing dimension as a receptive field
        for core in self.sigma.detach():
            nn.init.xavier_uniform_(core)

    def cores(self) -> Tensor:  # [S, P, Q]
        return self.sigma

    @property
    def drops(self) -> bool:
        return self.training and self.factor_dropout > 0

    def low_rank_pairs(self, slots: Iterable[Slot], backend: str | None) -> dict[str, Pair]:
        dropout = self.factor_dropout if self.training else 0.0
        return self._fold(list(slots), self.u, self.cores(), self.v, dropout, backend)

    def _fold(self, slots, u, sigma, v, dropout, backend) -> dict[str, Pair]:
        """(u, sigma v) for each slot; (sigma v).T and u.T where it is transposed, which needs no second launch"""
        scale = self.scale
        if isinstance(scale, Tensor):
            sigma, scale = (sigma * scale).to(sigma.dtype), 1.0
        device = u.device.type
        if torch.is_autocast_enabled(device) and u.dtype != torch.float64:
            u = u.to(torch.get_autocast_dtype(device))  # once, not in every Linear
        if dropout:
            downs, ups = _drawn(slots, u, sigma, v, scale, dropout)
        else:
            downs, ups = _undrawn(slots, u, sigma, v, scale, backend)
        pairs = {}
        for slot in slots:
            down, up = next(downs[slot.call]), _side_by_side([next(run) for run in ups[slot.site.path]])
            down, up = (up.mT, down.mT) if slot.transposed else (down, up)
            pairs[slot.site.path] = Pair(down, up, self.activation_dropout)
        return pairs


class FacTGroup(EFFTGroup):
    """As EFFT with d x d slices, except fc2: slices on top of each other, so that U is the factor that meets Sigma.

    With x = [x_0 ... x_3], sum_i x_i U Sigma_i V has down = [U Sigma_0; ...; U Sigma_3] and up = V: a transposed slot
    of the group (V.T, Sigma.T, U.T).
    """

    def low_rank_pairs(self, slots: Iterable[Slot], backend: str | None) -> dict[str, Pair]:
        slots, sigma = list(slots), self.cores()
        plain = [slot for slot in slots if not slot.transposed]
        stacked = [slot for slot in slots if slot.transposed]
        pairs = self._fold(plain, self.u, sigma, self.v, 0.0, backend) if plain else {}
        if stacked:
            pairs |= self._fold(stacked, self.v.mT, sigma.mT, self.u.mT, 0.0, backend)
        return pairs


class FacTTuckerGroup(FacTGroup):
    """Sigma_s = sum_k p[s, k] c[k], with c [r, r, r] and p [S, r]."""

    def _make_cores(self, S: int, P: int, Q: int) -> None:
        self.c, self.p = self._parameter(P, P, Q), self._parameter(S, P)
        for core in self.c.detach():
            nn.init.xavier_uniform_(core)
        nn.init.xavier_uniform_(self.p.detach())

    def cores(self) -> Tensor:
        return (self.p @ self.c.flatten(-2)).unflatten(-1, self.c.shape[-2:])


class LoRAGroup(Group):
    """a [L, m, K, R], b [L, m, R, N]: L Linears of one kind, m adapted matrices in each."""

    def __init__(self, spec: GroupSpec, config: MethodConfig, weights: Mapping[str, Tensor]):
        super().__init__(spec, config, weights)
        chosen = [i for i, part in enumerate(spec.slots[0].parts) if part.core is not None]
        place = torch.zeros(len(chosen), 1, len(spec.slots[0].parts), 1, **self._like)
        for row, column in enumerate(chosen):
            place[row, 0, column, 0] = 1.0
        # places the m matrices among all matrices of the Linear: up[l, m, r, part, n] = b[l, m, r, n] * place
        self.register_buffer("place", place * self.scale, persistent=False)
        self.index = {path: i for i, path in enumerate(self.slots)}
        self.make(len(spec.slots), chosen, weights)

    def make(self, L: int, chosen: list[int], weights: Mapping[str, Tensor]) -> None:
        """Create and initialise the factors; ``chosen`` are the adapted parts of each Linear."""
        m, R = len(chosen), self.spec.rank[0]
        self.a, self.b = self._parameter(L, m, self.spec.K, R), self._parameter(L, m, R, self.spec.N)
        for matrix in self.a.detach().flatten(0, 1):
            nn.init.xavier_uniform_(matrix)
        nn.init.zeros_(self.b)

    def factors(self, rows: slice) -> tuple[Tensor, Tensor]:  # [l, m, K, R], [l, m, R, N]
        """a and b of some of the Linears"""
        return _rows(self.a, rows), _rows(self.b, rows)

    def low_rank_pairs(self, slots: Iterable[Slot], backend: str | None) -> dict[str, Pair]:
        slots = list(slots)
        first = self.index[slots[0].site.path]
        rows = slice(first, first + 1) if len(slots) == 1 else slice(None)
        a, b = self.factors(rows)
        down = a.transpose(-3, -2).flatten(-2)  # [l, K, m R]
        up = (b.unsqueeze(-2) * self._placed(b)).flatten(-2).flatten(-3, -2)  # [l, m R, parts N]
        pairs = zip(down.unbind(-3), up.unbind(-3))
        return {slot.site.path: Pair(*pair) for slot, pair in zip(self.spec.slots[rows], pairs)}

    def _placed(self, b: Tensor) -> Tensor:
        """place, with a dimension for the Linears if there is one for the adapters"""
        return self.place if b.dim() == 4 else self.place.unsqueeze(1)


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

    def factors(self, rows: slice) -> tuple[Tensor, Tensor]:
        return _rows(self.a, rows), _rows(self.sigma, rows) @ _rows(self.v, rows)


class VeRAGroup(LoRAGroup):
    """d [L, m, R] and b [L, m, N] trained; u [K, R] and v [R, N] frozen and random, shared by all Linears."""

    def make(self, L: int, chosen: list[int], weights: Mapping[str, Tensor]) -> None:
        K, N, R = self.spec.K, self.spec.N, self.spec.rank[0]
        self.register_buffer("u", nn.init.kaiming_uniform_(torch.empty(K, R, **self._like)))
        self.register_buffer("v", nn.init.kaiming_uniform_(torch.empty(R, N, **self._like)))
        self.d, self.b = self._parameter(L, len(chosen), R), self._parameter(L, len(chosen), N)
        nn.init.constant_(self.d, 0.1)
        nn.init.zeros_(self.b)

    def low_rank_pairs(self, slots: Iterable[Slot], backend: str | None) -> dict[str, Pair]:
        slots = list(slots)
        first = self.index[slots[0].site.path]
        rows = slice(first, first + 1) if len(slots) == 1 else slice(None)
        d, b = (t[..., rows, :, :].unsqueeze(dim) for t, dim in ((self.d, -1), (self.b, -2)))
        v = self.v if self.v.dim() == 2 else self.v[:, None, None]
        up = d * v * b  # [l, m, R, N]
        # all matrices of a Linear read the same x u, so their rows add up instead of standing below each other
        up = (up.unsqueeze(-2) * self._placed(up)).sum(-4).flatten(-2)
        return {slot.site.path: Pair(self.u, row) for slot, row in zip(self.spec.slots[rows], up.unbind(-3))}


def _fact_group(spec, config, weights):
    return (FacTGroup if config.variant == "tt" else FacTTuckerGroup)(spec, config, weights)


GROUPS: dict[type[MethodConfig], Callable[[GroupSpec, MethodConfig, Mapping[str, Tensor]], Group]] = {
    EFFTConfig: EFFTGroup,
    FacTConfig: _fact_group,
    LoRAConfig: LoRAGroup,
    VeRAConfig: VeRAGroup,
    LoRAXSConfig: LoRAXSGroup,
}


def make_group(spec: GroupSpec, config: MethodConfig, weights: Mapping[str, Tensor]) -> Group:
    """The group of this config's method. Arguments as :class:`Group`."""
    method = next(cls for cls in type(config).__mro__ if cls in GROUPS)
    return GROUPS[method](spec, config, weights)


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


def _undrawn(slots, u, sigma, v, scale, backend) -> tuple[dict[int, Iterator], dict[str, list[Iterator]]]:
    """(call -> u's, path -> its runs of columns) with one group update for all slots"""
    order = sorted({core for slot in slots for core in slot.cores})
    ups = _updates(_select(sigma, order), v, scale, backend)
    us = iter(_fan(u, len(slots)))
    position = {core: i for i, core in enumerate(order)}
    return {slot.call: us for slot in slots}, _columns([ups], slots, [position] * len(slots), v.shape[-1], len(order))


def _drawn(slots, u, sigma, v, scale, dropout) -> tuple[dict[int, Iterator], dict[str, list[Iterator]]]:
    """as _undrawn, with masks for every call: v then differs from call to call, so the update is batched"""
    calls = {}
    for slot in slots:
        calls.setdefault(slot.call, []).append(slot)
    cores = {call: list(dict.fromkeys(core for slot in s for core in slot.cores)) for call, s in calls.items()}
    sizes = {len(found) for found in cores.values()}
    n = sizes.pop() if len(sizes) == 1 else 1
    order, positions = [], {}
    for call, found in cores.items():
        positions[call] = {core: len(order) + i for i, core in enumerate(found)}
        order += found
    sigma = F.dropout(_select(sigma, order), dropout) * scale
    sigma = sigma.unflatten(-3, (-1, n)).transpose(-3, -2).flatten(-3, -2)  # [C, P n, Q]
    v = F.dropout(_times(v, sigma.shape[-3]), dropout)
    ups = torch.matmul(sigma, v).unflatten(-2, (-1, n)).flatten(-2).unbind(-3)  # C matrices [P, n N]
    us = F.dropout(_times(u, len(calls)), dropout).unbind(-3)
    downs = {call: iter(_fan(drawn, len(s))) for drawn, (call, s) in zip(us, calls.items())}
    return downs, _columns(ups, slots, [positions[slot.call] for slot in slots], v.shape[-1], n)


def _select(sigma: Tensor, order: list[int]) -> Tensor:
    """sigma[order] whose gradient needs no scatter: a range, whole repetitions, or single slices"""
    S, n = sigma.shape[-3], len(order)
    if order == list(range(order[0], order[0] + n)):
        return sigma if n == S else sigma[..., order[0] : order[0] + n, :, :]
    if order == list(range(S)) * (n // S):
        return _times(sigma, n // S, -4).flatten(-4, -3)
    return torch.stack([sigma[..., core, :, :] for core in order], -3)


def _fan(t: Tensor, n: int) -> tuple[Tensor, ...]:
    """t, n times; the gradients come back as one stack and one sum instead of n - 1 additions"""
    return (t,) if n == 1 else _times(t, n).unbind(-3)


def _times(t: Tensor, n: int, dim: int = -3) -> Tensor:
    """t, n times along a new dimension"""
    t = t.unsqueeze(dim)
    return t.expand(*t.shape[:dim], n, *t.shape[dim + 1 :])


def _columns(matrices, slots, positions, N: int, n: int) -> dict[str, list[Iterator]]:
    """path -> for each run of neighbouring columns that it needs, where to take them from

    matrices: each [P, n N], together the updates of all cores side by side. positions: for each slot, core -> number.
    Every matrix is split once, so that its gradient is one concatenation.
    """
    zeros = len(matrices)  # stands for a matrix of zeros
    needs = []
    for slot, position in zip(slots, positions):
        runs = []  # (matrix, start, width)
        for core, start, width in slot.parts:
            matrix, place = (zeros, 0) if core is None else divmod(position[core], n)
            start += place * N
            if runs and runs[-1][0] == matrix and (matrix == zeros or sum(runs[-1][1:]) == start):
                runs[-1] = (matrix, runs[-1][1], runs[-1][2] + width)
            else:
                runs.append((matrix, start, width))
        needs.append(runs)
    uses = Counter(run for runs in needs for run in runs)
    found, ends = {}, [[] for _ in matrices]
    for run in sorted(uses):
        if run[0] == zeros:
            found[run] = iter((matrices[0].new_zeros(*matrices[0].shape[:-1], run[2]),) * uses[run])
        else:
            ends[run[0]].append(run)
    for matrix, runs in zip(matrices, ends):
        widths, kept, at = [], [], 0
        for run in runs:
            if run[1] > at:
                widths.append(run[1] - at)
            kept.append(len(widths))
            widths.append(run[2])
            at = run[1] + run[2]
        if at < matrix.shape[-1]:
            widths.append(matrix.shape[-1] - at)
        pieces = (matrix,) if len(widths) == 1 else matrix.split(widths, -1)
        for run, i in zip(runs, kept):
            found[run] = iter(_fan(pieces[i], uses[run]))
    return {slot.site.path: [found[run] for run in runs] for slot, runs in zip(slots, needs)}


def _side_by_side(runs: list[Tensor]) -> Tensor:
    return runs[0] if len(runs) == 1 else torch.cat(runs, -1)
