"""Methods: a config says which slices of which Linears form a group; a group turns its trained factors into (down, up).

Every method of the family computes y = x W + b + (x @ down) @ up for each Linear and differs only in where down and up
come from. A method is one config (its options, and how it arranges the Linears of a model into groups) and one group
(its parameters, and how they become pairs). Nothing here knows a model: inject.py describes one as a list of sites.
"""

import copy
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import group_update

TARGETS = {
    "attn": ("q", "k", "v", "proj"),
    "mlp": ("gate", "fc1", "fc2"),
    "qkv": ("q", "k", "v"),
    **{part: (part,) for part in ("q", "k", "v", "proj", "gate", "fc1", "fc2")},
}
_ATTENTION = TARGETS["attn"]

Rank = int | tuple[int, int]


# -- what a model, a group and a hand-out look like -------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """One Linear of a model that an adapter takes: the matrices it holds side by side, and which of them are adapted."""

    path: str
    parts: tuple[str, ...]  # values of TARGETS: ("q", "k", "v") for a fused projection, ("fc2",) for a plain one
    chosen: tuple[str, ...]  # the parts that the config targets
    block: int  # counted over the whole model
    stage: int  # blocks of one stage have one width
    in_features: int
    out_features: int

    @property
    def width(self) -> int:
        """columns of one part"""
        return self.out_features // len(self.parts)


class Part(NamedTuple):
    """Where the columns of one matrix come from: ``width`` columns of a core's update, or zeros if not adapted."""

    core: int | None
    start: int
    width: int


@dataclass(frozen=True)
class Slot:
    """One Linear as its group sees it."""

    site: Site
    parts: tuple[Part, ...]
    transposed: bool = False  # the update is the transposed product: fc2
    call: int = 0  # slots with the same number share one draw of the dropout masks of u and v

    @property
    def cores(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(part.core for part in self.parts if part.core is not None))


@dataclass(frozen=True)
class GroupSpec:
    """Everything a group needs to be built: plain data, printed by a plan and hashed into an adapter's fingerprint."""

    name: str
    K: int  # rows of u
    N: int  # columns of v
    rank: tuple[int, int]  # (P, Q)
    cores: int
    slots: tuple[Slot, ...]
    zero: str = "v"


class Pair(NamedTuple):
    """What one Linear adds: (x @ down) @ up, with ``dropout`` on x @ down while training."""

    down: Tensor  # [K, R]
    up: Tensor  # [R, N]
    dropout: float = 0.0


# -- configs ----------------------------------------------------------------------------------------------------------


class _Config:
    """Checks that all configs share, and their way to and from JSON."""

    group: ClassVar[type["Group"]]

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        for name in ("rank", "ffn_rank"):
            rank = getattr(self, name, None)
            pair = rank if isinstance(rank, tuple) else (rank, rank)
            if rank is None and name == "ffn_rank":
                continue
            if len(pair) != 2 or not all(type(r) is int and r >= 1 for r in pair):
                raise ValueError(f"{name} must be an int of at least 1 or a pair of them, got {rank!r}")
        if not _is_number(self.scale) or not abs(self.scale) <= sys.float_info.max:
            raise ValueError(f"scale must be a finite number, got {self.scale!r}")
        for name in ("factor_dropout", "activation_dropout"):
            rate = getattr(self, name, 0.0)
            if not (_is_number(rate) and 0 <= rate < 1):
                raise ValueError(f"{name} must be a number in [0, 1), got {rate!r}")
        if not isinstance(getattr(self, "trainable_scale", False), bool):
            raise ValueError(f"trainable_scale must be True or False, got {self.trainable_scale!r}")
        targets, blocks = self.targets, self.blocks
        if not isinstance(targets, tuple) or not targets or not all(t in list(TARGETS) for t in targets):
            raise ValueError(f"targets must be a non-empty tuple out of {sorted(TARGETS)}, got {targets!r}")
        good = isinstance(blocks, tuple) and blocks and all(type(b) is int and b >= 0 for b in blocks)
        if not (blocks is None or good):
            raise ValueError(f"blocks must be None or a non-empty tuple of block numbers, got {blocks!r}")

    def _choice(self, name: str, *allowed) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}")

    def chosen(self, parts: Iterable[str]) -> tuple[str, ...]:
        """Those of the parts that the targets name."""
        wanted = {part for target in self.targets for part in TARGETS[target]}
        return tuple(part for part in parts if part in wanted)

    def arrange(self, sites: list[Site]) -> list[GroupSpec]:
        """The groups that these Linears form. Raises ValueError with the path of a Linear that does not fit."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        return {"method": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_dict(data: Mapping) -> "_Config":
        """The inverse of to_dict; raises ValueError for what no config of this version could have written."""
        data = dict(data)
        method = data.pop("method", None)
        if method not in CONFIGS:
            raise ValueError(f"method must be one of {sorted(CONFIGS)}, got {method!r}")
        cls = CONFIGS[method]
        if unknown := set(data) - {field.name for field in fields(cls)}:
            raise ValueError(f"{method} has no option {', '.join(sorted(unknown))} in this version of efft_kernels")
        return cls(**data)


@dataclass(frozen=True)
class EFFTConfig(_Config):
    """EFFT (arXiv 2311.06749): dW_s = scale * U @ Sigma_s @ V, with U and V shared by a group and a core per matrix.

    Args:
        variant: "efft1", one group of slices d x 4d: a block's attention matrices side by side, fc1, fc2 transposed.
            "efft2", two groups: the attention matrices (d x d each), and fc1 with fc2 transposed (d x 4d each).
        rank: r or (r1, r2). In a model whose stages differ in width (Swin) it is the rank of the widest stage; the
            others get it in proportion to their width, as the released Swin does (rank=32 on Swin-B: 4, 8, 16, 32).
        scale: factor of the update; with trainable_scale its start.
        cores: "per_block" as in the paper, or "shared", as in the released ViT code: all blocks use one set of cores.
        factor_dropout: probability with which an entry of U, Sigma and V is dropped while training. U and V are drawn
            once per attention call (for q, k, v and the output projection together) and once for each FFN Linear.
        zero_init: the factor that starts at zero, "v" or "u"; for "efft2" also one letter for each group: "vv", "vu".
        targets: what is adapted: "attn", "mlp", "qkv", or single matrices "q", "k", "v", "proj", "gate", "fc1", "fc2".
        blocks: numbers of the adapted blocks, counted over the whole model, or None for all.
        trainable_scale: train one scale per group (section 4 of the paper suggests it).
        ffn_rank: rank of the FFN group of "efft2"; None for ``rank``, its r1 halved where stages differ in width.
    """

    variant: Literal["efft1", "efft2"] = "efft2"
    rank: Rank = 16
    scale: float = 10.0
    cores: Literal["per_block", "shared"] = "per_block"
    factor_dropout: float = 0.1
    zero_init: str = "v"
    targets: tuple[str, ...] = ("attn", "mlp")
    blocks: tuple[int, ...] | None = None
    trainable_scale: bool = False
    ffn_rank: Rank | None = None

    def __post_init__(self):
        super().__post_init__()
        self._choice("variant", "efft1", "efft2")
        self._choice("cores", "per_block", "shared")
        self._choice("zero_init", *(("v", "u") if self.variant == "efft1" else ("v", "u", "vv", "vu", "uv", "uu")))
        if self.ffn_rank is not None and self.variant == "efft1":
            raise ValueError("ffn_rank must be None for efft1, whose one group holds attention and FFN together")

    def arrange(self, sites: list[Site]) -> list[GroupSpec]:
        stages = _stages(sites)
        specs = []
        for stage, (portion, members) in stages.items():
            attention = [site for site in members if site.parts[0] in _ATTENTION]
            ffn = [site for site in members if site.parts[0] not in _ATTENTION]
            prefix = f"stage{stage}_" if len(stages) > 1 else ""
            rank = _scaled(self.rank, portion)
            if self.variant == "efft1":
                specs.append(self._group(f"{prefix}all", members, rank, self.zero_init))
                continue
            if attention:
                specs.append(self._group(f"{prefix}attn", attention, rank, self.zero_init[0]))
            if ffn:
                if self.ffn_rank is not None:
                    rank = _scaled(self.ffn_rank, portion)
                elif any(portion != 1 for portion, _ in stages.values()):
                    rank = (max(1, rank[0] // 2), rank[1])
                specs.append(self._group(f"{prefix}ffn", ffn, rank, self.zero_init[-1]))
        return specs

    def _group(self, name: str, sites: list[Site], rank: tuple[int, int], zero: str) -> GroupSpec:
        cores, calls, slots, shape = {}, {}, [], None
        for site in sites:
            attention, transposed = site.parts[0] in _ATTENTION, site.parts == ("fc2",)
            K, N = site.in_features, site.width
            if transposed:
                K, N = N, K
            side_by_side = attention and self.variant == "efft1"
            if side_by_side:
                N *= len(_ATTENTION)
            shape = shape or (K, N)
            if shape != (K, N) or (side_by_side and site.width != K):
                raise ValueError(
                    f"the slices of group {name!r} ({self.variant}) must all be {shape[0]} x {shape[1]}, got {K} x {N} "
                    f"from {site.path}; choose other targets" + " or efft2" * (self.variant == "efft1")
                )
            parts = []
            for part in site.parts:
                start = _ATTENTION.index(part) * site.width if side_by_side else 0
                key = "attn" if side_by_side else part
                key = key if self.cores == "shared" else (site.block, key)
                core = cores.setdefault(key, len(cores)) if part in site.chosen else None
                parts.append(Part(core, start, site.width if not transposed else N))
            call = calls.setdefault((site.block, "attn" if attention else site.path), len(calls))
            slots.append(Slot(site, tuple(parts), transposed, call))
        return GroupSpec(name, *shape, _fitting(rank, shape, name), len(cores), tuple(slots), zero)


@dataclass(frozen=True)
class FacTConfig(_Config):
    """FacT (arXiv 2212.03145): one U and V for the whole model, and a core for each of its d x d matrices.

    fc1 counts as d x d matrices side by side, fc2 as d x d matrices on top of each other (four of each in a ViT).

    Args:
        variant: "tt", a free core per matrix; or "tk" (Tucker), Sigma_s = sum_k P[s, k] C[k], which takes an int rank.
        rank, scale, targets, blocks: as :class:`EFFTConfig`.
        activation_dropout: probability with which an entry of x @ down is dropped while training. The original drops
            x U Sigma; here q, k and v share one x U, which is what is dropped. Nonzero takes the unfused path.
    """

    variant: Literal["tt", "tk"] = "tt"
    rank: Rank = 16
    scale: float = 1.0
    activation_dropout: float = 0.1
    targets: tuple[str, ...] = ("attn", "mlp")
    blocks: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        self._choice("variant", "tt", "tk")
        if self.variant == "tk" and not isinstance(self.rank, int):
            raise ValueError(f"rank must be an int for tk, got {self.rank!r}")

    def arrange(self, sites: list[Site]) -> list[GroupSpec]:
        stages = _stages(sites)
        specs = []
        for stage, (portion, members) in stages.items():
            name = f"stage{stage}_all" if len(stages) > 1 else "all"
            d = min(min(site.in_features, site.width) for site in members)
            cores, slots = 0, []
            # fc2 last, so that the cores of both kinds are ranges
            for site in sorted(members, key=lambda site: site.parts == ("fc2",)):
                transposed = site.parts == ("fc2",)
                one, many = (site.width, site.in_features) if transposed else (site.in_features, site.width)
                if one != d or many % d:
                    raise ValueError(f"FacT cuts matrices into {d} x {d} slices; {site.path} is {one} x {many}")
                parts = []
                for part in site.parts:
                    for _ in range(many // d):
                        parts.append(Part(cores if part in site.chosen else None, 0, d))
                        cores += part in site.chosen
                slots.append(Slot(site, tuple(parts), transposed))
            rank = _fitting(_scaled(self.rank, portion), (d, d), name)
            specs.append(GroupSpec(name, d, d, rank, cores, tuple(slots)))
        return specs


class _PerMatrix(_Config):
    """Methods without a tensor across layers: one group for each kind of Linear, one core for each matrix."""

    def arrange(self, sites: list[Site]) -> list[GroupSpec]:
        stages = _stages(sites)
        specs = []
        for stage, (portion, members) in stages.items():
            kinds = {}
            for site in members:
                kinds.setdefault((site.parts, site.chosen, site.in_features, site.width), []).append(site)
            for (parts, chosen, K, N), same in kinds.items():
                name = "_".join([f"stage{stage}"] * (len(stages) > 1) + ["".join(parts)])
                cores, slots = iter(range(len(same) * len(chosen))), []
                for site in same:
                    slots.append(Slot(site, tuple(Part(next(cores) if p in chosen else None, 0, N) for p in parts)))
                rank = _fitting(_scaled(self.rank, portion), (K, N), name)
                specs.append(GroupSpec(name, K, N, rank, len(same) * len(chosen), tuple(slots)))
        if repeated := [name for name, n in Counter(spec.name for spec in specs).items() if n > 1]:
            raise ValueError(f"the Linears {repeated} differ in shape from block to block; name the blocks to adapt")
        return specs

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.rank, int):
            raise ValueError(f"rank must be an int for {type(self).__name__}, got {self.rank!r}")


@dataclass(frozen=True)
class LoRAConfig(_PerMatrix):
    """LoRA (arXiv 2106.09685): down = A, up = scale * B, both trained, for each matrix. Arguments as EFFTConfig's."""

    rank: int = 8
    scale: float = 1.0
    targets: tuple[str, ...] = ("q", "v")
    blocks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class VeRAConfig(_PerMatrix):
    """VeRA (arXiv 2310.11454): scale * U diag(d) V diag(b), U and V frozen, random and shared by all blocks.

    Arguments as EFFTConfig's.
    """

    rank: int = 256
    scale: float = 1.0
    targets: tuple[str, ...] = ("q", "v")
    blocks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LoRAXSConfig(_PerMatrix):
    """LoRA-XS (arXiv 2405.17604): scale * U Sigma V with U and V frozen, from the SVD of the weight, and Sigma trained.

    Sigma starts at exactly zero (the paper: 1e-5 times normal), so that nothing changes at the start. Arguments as
    EFFTConfig's.
    """

    rank: int = 16
    scale: float = 1.0
    targets: tuple[str, ...] = ("attn", "mlp")
    blocks: tuple[int, ...] | None = None


def _plain(value):
    """lists as tuples, and numpy's numbers, for which JSON has no word, as Python's"""
    if isinstance(value, list | range | tuple):
        return tuple(map(_plain, value))
    if type(value) in (bool, int, float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _stages(sites: list[Site]) -> dict[int, tuple[float, list[Site]]]:
    """stage -> (its width as a portion of the widest, its sites)"""
    stages = {}
    for site in sites:
        stages.setdefault(site.stage, []).append(site)
    width = {stage: min(min(s.in_features, s.width) for s in members) for stage, members in stages.items()}
    return {stage: (width[stage] / max(width.values()), members) for stage, members in stages.items()}


def _scaled(rank: Rank, portion: float) -> tuple[int, int]:
    return tuple(max(1, round(r * portion)) for r in (rank if isinstance(rank, tuple) else (rank, rank)))


def _fitting(rank: tuple[int, int], shape: tuple[int, int], name: str) -> tuple[int, int]:
    if max(rank) > min(shape):
        raise ValueError(
            f"rank must be at most {min(shape)} in group {name!r} of {shape[0]} x {shape[1]} slices, got {rank}"
        )
    return rank


# -- groups -----------------------------------------------------------------------------------------------------------


class Group(nn.Module):
    """The trained factors of one group, or of that group in several adapters: see :func:`stack`.

    Args:
        spec: shapes and slots.
        config: the options of the method.
        weights: path -> frozen weight [N, K] of each slot, for device, dtype and the SVD of LoRA-XS. Empty tensors will
            do for a group whose factors are about to be loaded.
    """

    def __init__(self, spec: GroupSpec, config: _Config, weights: Mapping[str, Tensor]):
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

    def hand_out(self, slots: Iterable[Slot], backend: str | None) -> dict[str, Pair]:
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

    def __init__(self, spec: GroupSpec, config: _Config, weights: Mapping[str, Tensor]):
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

    def hand_out(self, slots: Iterable[Slot], backend: str | None) -> dict[str, Pair]:
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

    def hand_out(self, slots: Iterable[Slot], backend: str | None) -> dict[str, Pair]:
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

    def __init__(self, spec: GroupSpec, config: _Config, weights: Mapping[str, Tensor]):
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

    def hand_out(self, slots: Iterable[Slot], backend: str | None) -> dict[str, Pair]:
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

    def hand_out(self, slots: Iterable[Slot], backend: str | None) -> dict[str, Pair]:
        slots = list(slots)
        first = self.index[slots[0].site.path]
        rows = slice(first, first + 1) if len(slots) == 1 else slice(None)
        d, b = (t[..., rows, :, :].unsqueeze(dim) for t, dim in ((self.d, -1), (self.b, -2)))
        v = self.v if self.v.dim() == 2 else self.v[:, None, None]
        up = d * v * b  # [l, m, R, N]
        # all matrices of a Linear read the same x u, so their rows add up instead of standing below each other
        up = (up.unsqueeze(-2) * self._placed(up)).sum(-4).flatten(-2)
        return {slot.site.path: Pair(self.u, row) for slot, row in zip(self.spec.slots[rows], up.unbind(-3))}


EFFTConfig.group, LoRAConfig.group, LoRAXSConfig.group, VeRAConfig.group = EFFTGroup, LoRAGroup, LoRAXSGroup, VeRAGroup
FacTConfig.group = property(lambda config: FacTGroup if config.variant == "tt" else FacTTuckerGroup)
CONFIGS = {cls.__name__: cls for cls in (EFFTConfig, FacTConfig, LoRAConfig, VeRAConfig, LoRAXSConfig)}


# -- from factors to columns ------------------------------------------------------------------------------------------


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
