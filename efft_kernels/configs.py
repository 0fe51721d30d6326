"""Configs: the options of each method, and how the method arranges the Linears of a model into groups. No torch.

Nothing here knows a model: layouts.py describes one as a list of sites.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Literal, NamedTuple

TARGETS = {
    "attn": ("q", "k", "v", "proj"),
    "mlp": ("gate", "fc1", "fc2"),
    "qkv": ("q", "k", "v"),
    **{part: (part,) for part in ("q", "k", "v", "proj", "gate", "fc1", "fc2")},
}
ATTENTION = TARGETS["attn"]

Rank = int | tuple[int, int]


@dataclass(frozen=True)
class Site:
    """A Linear of a model that can be adapted: the matrices it holds side by side, and which of them are adapted."""

    path: str
    parts: tuple[str, ...]  # values of TARGETS: ("q", "k", "v") for a fused projection, ("fc2",) for a plain one
    chosen: tuple[str, ...]  # the parts that the config targets
    block: int  # counted over the whole model
    stage: int  # blocks of one stage have one width
    in_features: int
    out_features: int
    branch: str = ""  # tells a Linear from others of the same role in its block, as those of a second attention

    @property
    def width(self) -> int:
        """Output features of one part."""
        return self.out_features // len(self.parts)


class Part(NamedTuple):
    """Where ``width`` columns of a Linear's update come from: a core's update from ``start`` on, or zeros."""

    core: int | None
    start: int
    width: int


@dataclass(frozen=True)
class Slot:
    """A Linear as a member of a group."""

    site: Site
    parts: tuple[Part, ...]
    transposed: bool = False  # the update is the transposed product, as for fc2
    call: int = 0  # slots with the same number share the dropout masks of u and v

    @property
    def cores(self) -> tuple[int, ...]:
        """The cores its parts use, each once."""
        return tuple(dict.fromkeys(part.core for part in self.parts if part.core is not None))


@dataclass(frozen=True)
class GroupSpec:
    """What a group is built from: plain data, printed by a plan and hashed into an adapter's fingerprint."""

    name: str
    K: int  # rows of u
    N: int  # columns of v
    rank: tuple[int, int]  # (P, Q)
    cores: int
    slots: tuple[Slot, ...]
    zero: str = "v"  # the factor that starts at zero


class MethodConfig:
    """Base of all configs: the checks they share, and conversion to and from JSON."""

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
        for name in ("factor_dropout", "activation_dropout", "rank_dropout"):
            rate = getattr(self, name, 0.0)
            if not (_is_number(rate) and 0 <= rate < 1):
                raise ValueError(f"{name} must be a number in [0, 1), got {rate!r}")
        for name in ("trainable_scale", "rank_weights", "channel_scale", "rank_stabilized", "dora"):
            if not isinstance(getattr(self, name, False), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if hasattr(self, "init"):
            self._choice("init", "xavier", "released")
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
        """The parts that the targets name, out of these."""
        wanted = {part for target in self.targets for part in TARGETS[target]}
        return tuple(part for part in parts if part in wanted)

    def arrange(self, sites: list[Site], *, by_shape: bool = True) -> list[GroupSpec]:
        """The groups that these Linears form.

        Args:
            sites: the Linears, each with parts that are chosen.
            by_shape: where the Linears of a stage differ in shape, form a group of each shape.

        Raises:
            ValueError: a Linear does not fit its group; the message has its path.
        """
        raise NotImplementedError

    def to_dict(self) -> dict:
        """The options and the name of the method, as JSON can hold them."""
        return {"method": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_dict(data: Mapping) -> "MethodConfig":
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: an unknown method or option, or a value outside its range.
        """
        data = dict(data)
        method = data.pop("method", None)
        if method not in CONFIGS:
            raise ValueError(f"method must be one of {sorted(CONFIGS)}, got {method!r}")
        cls = CONFIGS[method]
        if unknown := set(data) - {field.name for field in fields(cls)}:
            raise ValueError(f"{method} has no option {', '.join(sorted(unknown))} in this version of efft_kernels")
        return cls(**data)


@dataclass(frozen=True)
class EFFTConfig(MethodConfig):
    """EFFT (arXiv 2311.06749): dW_s = scale * U @ Sigma_s @ V, with U and V shared by a group and a core per matrix.

    Args:
        variant: "efft1", one group of d x 4d slices: a block's attention matrices side by side, fc1, fc2 transposed.
            "efft2", two groups: the attention matrices (d x d each), and fc1 with fc2 transposed (d x 4d each).
        rank: r or (r1, r2). In a model whose stages differ in width (Swin) it is the rank of the widest stage, and the
            others get it in proportion to their width, as in the released Swin (rank=32 on Swin-B: 4, 8, 16, 32).
            Where the Linears of a stage differ in shape (Hiera, MViTv2), those of each role and shape form a group, of
            a rank of at most the shorter side.
        scale: factor of the update; its initial value with trainable_scale.
        cores: "per_block" as in the paper, or "shared" as in the released ViT code: all blocks use one set of cores.
        factor_dropout: probability of dropping an entry of U, Sigma and V while training. Masks of U and V are drawn
            once per attention call (for q, k, v and the output projection together) and once per FFN Linear.
        zero_init: the factor that starts at zero, "v" or "u"; for "efft2" also one letter per group: "vv", "vu".
        targets: what is adapted: "attn", "mlp", "qkv", or single matrices "q", "k", "v", "proj", "gate", "fc1", "fc2".
        blocks: numbers of the adapted blocks, counted over the whole model; None for all.
        trainable_scale: train one scale per group (suggested in section 4 of the paper).
        ffn_rank: rank of the FFN group of "efft2"; None for ``rank``, with r1 halved where stages differ in width.
        init: "xavier" draws each factor and each core by Xavier's rule. "released" draws the cores as the released code
            does, smaller by the root of the number of matrices in a block: the speed of an update is its scale times
            the size of what multiplies the zero factor, so released scales belong to this start.
        rank_dropout: probability of dropping a rank-1 term (U Sigma_s)[:, q] V[q, :] of a matrix while training, with
            one mask per forward for all images (MLAE, arXiv 2405.18897).
        rank_weights: train a coefficient for each of these terms, which starts at 1 (MLAE): r2 more numbers a core.
        channel_scale: train a factor for each output of each adapted matrix, which starts at 1 and multiplies that
            column of the update (Adapter+, arXiv 2406.06820): as many more numbers as the matrices have outputs.
        rank_stabilized: divide ``scale`` by the root of the rank that is summed over, r2, or r1 if U starts at zero
            (rsLoRA, arXiv 2312.03732), so that one scale fits all ranks.
        dora: each output n of an adapted matrix computes with m_n (W + dW)_n / ||(W + dW)_n||, the magnitude m trained
            from ||W_n|| on (DoRA, arXiv 2402.09353): as many more numbers as the matrices have outputs. The norm is a
            constant in the backward, as in section 4.3 of that paper. Rows of zeros keep x (W + dW).
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
    init: Literal["xavier", "released"] = "xavier"
    rank_dropout: float = 0.0
    rank_weights: bool = False
    channel_scale: bool = False
    rank_stabilized: bool = False
    dora: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._choice("variant", "efft1", "efft2")
        self._choice("cores", "per_block", "shared")
        self._choice("zero_init", *(("v", "u") if self.variant == "efft1" else ("v", "u", "vv", "vu", "uv", "uu")))
        if self.ffn_rank is not None and self.variant == "efft1":
            raise ValueError("ffn_rank must be None for efft1, whose one group holds attention and FFN together")

    def arrange(self, sites: list[Site], *, by_shape: bool = True) -> list[GroupSpec]:
        stages = _stages(sites)
        specs = []
        for stage, (portion, members) in stages.items():
            attention = [site for site in members if site.parts[0] in ATTENTION]
            ffn = [site for site in members if site.parts[0] not in ATTENTION]
            prefix = f"stage{stage}_" if len(stages) > 1 else ""
            make = self._by_shape if by_shape and self._differ_in_shape(attention, ffn) else self._one_group
            rank = scaled_rank(self.rank, portion)
            if self.variant == "efft1":
                specs += make(f"{prefix}all", members, rank, self.zero_init)
                continue
            if attention:
                specs += make(f"{prefix}attn", attention, rank, self.zero_init[0])
            if ffn:
                if self.ffn_rank is not None:
                    rank = scaled_rank(self.ffn_rank, portion)
                elif any(portion != 1 for portion, _ in stages.values()):
                    rank = (max(1, rank[0] // 2), rank[1])
                specs += make(f"{prefix}ffn", ffn, rank, self.zero_init[-1])
        return specs

    def _differ_in_shape(self, attention: list[Site], ffn: list[Site]) -> bool:
        """whether the slices of attention, or of the FFN, are not all of the shape that the paper's groups have"""
        square = {(site.in_features, site.width) for site in attention}
        wide = {(site.in_features, site.width)[:: -1 if site.parts == ("fc2",) else 1] for site in ffn}
        flat = self.variant == "efft1" and any(K != N for K, N in square)
        return len(square) > 1 or len(wide) > 1 or flat

    def _by_shape(self, name: str, sites: list[Site], rank: tuple[int, int], zero: str) -> list[GroupSpec]:
        """One group per shape. K is the smaller side, so that a matrix and one of the transposed shape share a group;
        of several matrices side by side it is the side they share."""
        groups = {}
        for site in sites:
            transposed = len(site.parts) == 1 and site.in_features > site.width
            shape = (site.in_features, site.width)[:: -1 if transposed else 1]
            cores, calls, slots = groups.setdefault(shape, ({}, {}, []))
            parts = []
            for part in site.parts:
                key = site.branch, part
                key = key if self.cores == "shared" else (site.block, *key)
                core = cores.setdefault(key, len(cores)) if part in site.chosen else None
                parts.append(Part(core, 0, shape[1]))
            attention = site.parts[0] in ATTENTION
            call = calls.setdefault((site.block, site.branch, "attn") if attention else site.path, len(calls))
            slots.append(Slot(site, tuple(parts), transposed, call))
        return [
            GroupSpec(f"{name}_{K}x{N}", K, N, tuple(min(r, K, N) for r in rank), len(cores), tuple(slots), zero)
            for (K, N), (cores, _, slots) in groups.items()
        ]

    def _one_group(self, name: str, sites: list[Site], rank: tuple[int, int], zero: str) -> list[GroupSpec]:
        cores, calls, slots, shape = {}, {}, [], None
        for site in sites:
            attention, transposed = site.parts[0] in ATTENTION, site.parts == ("fc2",)
            K, N = site.in_features, site.width
            if transposed:
                K, N = N, K
            side_by_side = attention and self.variant == "efft1"
            if side_by_side:
                N *= len(ATTENTION)
            shape = shape or (K, N)
            if shape != (K, N) or (side_by_side and site.width != K):
                raise ValueError(
                    f"the slices of group {name!r} ({self.variant}) must all be {shape[0]} x {shape[1]}, got {K} x {N} "
                    f"from {site.path}; choose other targets" + " or efft2" * (self.variant == "efft1")
                )
            parts = []
            for part in site.parts:
                start = ATTENTION.index(part) * site.width if side_by_side else 0
                key = site.branch, "attn" if side_by_side else part
                key = key if self.cores == "shared" else (site.block, *key)
                core = cores.setdefault(key, len(cores)) if part in site.chosen else None
                parts.append(Part(core, start, site.width if not transposed else N))
            call = calls.setdefault((site.block, site.branch, "attn") if attention else site.path, len(calls))
            slots.append(Slot(site, tuple(parts), transposed, call))
        return [GroupSpec(name, *shape, fitting_rank(rank, shape, name), len(cores), tuple(slots), zero)]


@dataclass(frozen=True)
class FacTConfig(MethodConfig):
    """FacT (arXiv 2212.03145): one U and V for the whole model, and a core for each of its d x d matrices.

    fc1 counts as d x d matrices side by side, fc2 as d x d matrices on top of each other (four of each in a ViT).

    Args:
        variant: "tt", a free core per matrix; or "tk" (Tucker), Sigma_s = sum_k P[s, k] C[k], which takes an int rank.
        rank, scale, targets, blocks, rank_dropout, rank_weights, channel_scale, rank_stabilized, dora: as
            :class:`EFFTConfig`.
        activation_dropout: probability of dropping an entry of x @ down while training. The original drops x U Sigma;
            here q, k and v share one x U, and that is dropped. A value above 0 takes the unfused path in training.
        init: "xavier" for each factor and core, or "released": uniform with the bound 1 / sqrt(inputs) of nn.Linear for
            U and the cores of "tt", Xavier on the whole tensor C for "tk".
    """

    variant: Literal["tt", "tk"] = "tt"
    rank: Rank = 16
    scale: float = 1.0
    activation_dropout: float = 0.1
    targets: tuple[str, ...] = ("attn", "mlp")
    blocks: tuple[int, ...] | None = None
    init: Literal["xavier", "released"] = "xavier"
    rank_dropout: float = 0.0
    rank_weights: bool = False
    channel_scale: bool = False
    rank_stabilized: bool = False
    dora: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._choice("variant", "tt", "tk")
        if self.variant == "tk" and not isinstance(self.rank, int):
            raise ValueError(f"rank must be an int for tk, got {self.rank!r}")

    def arrange(self, sites: list[Site], *, by_shape: bool = True) -> list[GroupSpec]:
        stages = _stages(sites)
        specs = []
        for stage, (portion, members) in stages.items():
            name = f"stage{stage}_all" if len(stages) > 1 else "all"
            sides = {}
            for site in members:
                sides.setdefault(min(site.in_features, site.width), []).append(site)
            if len(sides) == 1 or not by_shape:
                specs.append(self._one_group(name, min(sides), members, scaled_rank(self.rank, portion)))
                continue
            for d, same in sides.items():
                rank = tuple(min(r, d) for r in scaled_rank(self.rank, portion))
                specs.append(self._one_group(f"{name}_{d}", d, same, rank))
        return specs

    def _one_group(self, name: str, d: int, sites: list[Site], rank: tuple[int, int]) -> GroupSpec:
        def is_transposed(site: Site) -> bool:
            return site.parts == ("fc2",) or (len(site.parts) == 1 and site.in_features > site.width)

        cores, slots = 0, []
        # transposed ones last, so that the cores of both kinds are ranges
        for site in sorted(sites, key=is_transposed):
            transposed = is_transposed(site)
            one, many = (site.width, site.in_features) if transposed else (site.in_features, site.width)
            if one != d or many % d:
                raise ValueError(f"FacT cuts matrices into {d} x {d} slices; {site.path} is {one} x {many}")
            parts = []
            for part in site.parts:
                for _ in range(many // d):
                    parts.append(Part(cores if part in site.chosen else None, 0, d))
                    cores += part in site.chosen
            slots.append(Slot(site, tuple(parts), transposed))
        return GroupSpec(name, d, d, fitting_rank(rank, (d, d), name), cores, tuple(slots))


class _PerMatrix(MethodConfig):
    """Methods that share no tensor between layers: one group per kind of Linear, one core per matrix."""

    def arrange(self, sites: list[Site], *, by_shape: bool = True) -> list[GroupSpec]:
        stages = _stages(sites)
        specs = []
        for stage, (portion, members) in stages.items():
            kinds = {}
            for site in members:
                kinds.setdefault((site.parts, site.chosen, site.in_features, site.width), []).append(site)
            repeated = Counter("".join(parts) for parts, *_ in kinds)
            for (parts, chosen, K, N), same in kinds.items():
                differ = repeated["".join(parts)] > 1
                if differ and not by_shape:
                    raise ValueError(f"the Linears {''.join(parts)} differ in shape from block to block")
                name = "_".join([f"stage{stage}"] * (len(stages) > 1) + ["".join(parts)] + [f"{K}x{N}"] * differ)
                cores, slots = iter(range(len(same) * len(chosen))), []
                for site in same:
                    slots.append(Slot(site, tuple(Part(next(cores) if p in chosen else None, 0, N) for p in parts)))
                rank = scaled_rank(self.rank, portion)
                rank = tuple(min(r, K, N) for r in rank) if differ else fitting_rank(rank, (K, N), name)
                specs.append(GroupSpec(name, K, N, rank, len(same) * len(chosen), tuple(slots)))
        return specs

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.rank, int):
            raise ValueError(f"rank must be an int for {type(self).__name__}, got {self.rank!r}")


@dataclass(frozen=True)
class LoRAConfig(_PerMatrix):
    """LoRA (arXiv 2106.09685): down = A, up = scale * B, both trained, for each matrix. Arguments as EFFTConfig's.

    ``init="released"`` draws A uniformly with the bound 1 / sqrt(inputs) of nn.Linear, as LoRA's own code does. LoRA is
    MLAE (arXiv 2405.18897) with rank_dropout and rank_weights, rsLoRA (arXiv 2312.03732) with rank_stabilized, and
    DoRA (arXiv 2402.09353) with dora.
    """

    rank: int = 8
    scale: float = 1.0
    targets: tuple[str, ...] = ("q", "v")
    blocks: tuple[int, ...] | None = None
    init: Literal["xavier", "released"] = "xavier"
    rank_dropout: float = 0.0
    rank_weights: bool = False
    channel_scale: bool = False
    rank_stabilized: bool = False
    dora: bool = False


@dataclass(frozen=True)
class VeRAConfig(_PerMatrix):
    """VeRA (arXiv 2310.11454): scale * U diag(d) V diag(b), U and V frozen, random and shared by all blocks.

    Arguments as EFFTConfig's. Its d are coefficients of rank-1 terms, which rank_dropout drops, and its b scales of
    output channels.
    """

    rank: int = 256
    scale: float = 1.0
    targets: tuple[str, ...] = ("q", "v")
    blocks: tuple[int, ...] | None = None
    rank_dropout: float = 0.0
    rank_stabilized: bool = False


@dataclass(frozen=True)
class LoRAXSConfig(_PerMatrix):
    """LoRA-XS (arXiv 2405.17604): scale * U Sigma V with U and V frozen, from the SVD of the weight, and Sigma trained.

    Sigma starts at exactly zero (in the paper at 1e-5 times a normal variable), so that injecting changes no output.
    Arguments as EFFTConfig's.
    """

    rank: int = 16
    scale: float = 1.0
    targets: tuple[str, ...] = ("attn", "mlp")
    blocks: tuple[int, ...] | None = None
    rank_dropout: float = 0.0
    rank_weights: bool = False
    channel_scale: bool = False
    rank_stabilized: bool = False
    dora: bool = False


def _plain(value):
    """Lists as tuples, and NumPy numbers, which JSON cannot hold, as Python numbers."""
    if isinstance(value, list | range | tuple):
        return tuple(map(_plain, value))
    if type(value) in (bool, int, float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _stages(sites: list[Site]) -> dict[int, tuple[float, list[Site]]]:
    """stage -> (its width divided by the largest width, its sites)"""
    stages = {}
    for site in sites:
        stages.setdefault(site.stage, []).append(site)
    width = {stage: max(min(s.in_features, s.width) for s in members) for stage, members in stages.items()}
    return {stage: (width[stage] / max(width.values()), members) for stage, members in stages.items()}


def scaled_rank(rank: Rank, portion: float) -> tuple[int, int]:
    """(r1, r2) in proportion to the width of a stage, each at least 1."""
    return tuple(max(1, round(r * portion)) for r in (rank if isinstance(rank, tuple) else (rank, rank)))


def fitting_rank(rank: tuple[int, int], shape: tuple[int, int], name: str) -> tuple[int, int]:
    """The rank, or a ValueError if it is larger than the slices of group ``name`` allow."""
    if max(rank) > min(shape):
        raise ValueError(
            f"rank must be at most {min(shape)} in group {name!r} of {shape[0]} x {shape[1]} slices, got {rank}"
        )
    return rank


CONFIGS = {cls.__name__: cls for cls in (EFFTConfig, FacTConfig, LoRAConfig, VeRAConfig, LoRAXSConfig)}
