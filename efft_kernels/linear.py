"""Linears with an adapter, in place of nn.Linear: EFFTLinear owns its factors, AdaptedLinear refers to its model's."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .factors import Pair
from .ops import efft_linear, group_update, lowrank_linear, merge_


class EFFTLinear(nn.Linear):
    """y = x @ weight.T + bias + scale * x @ u @ sigma @ v, with weight and bias frozen and u, sigma, v trained.

    Equivalent to ``nn.Linear`` with weight + scale * (u @ [sigma[0] @ v, ..., sigma[S-1] @ v]).T (EFFT, arXiv
    2311.06749, section 3.2), which is never formed. At the start one factor is zero, so nothing changes.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        rank: of the adapter, an int or a pair (r1, r2); each from 1 to min(in_features, out_features / slices).
        scale: factor of the update, finite.
        slices: S, how many equal parts of the output share u and v with a core each: 3 for a fused qkv. Divides
            out_features.
        factor_dropout: probability with which each entry of u, sigma and v is dropped, with a fresh mask per call, while
            training; in [0, 1). Drawn from torch's generator: seeding it, or checkpointing, reproduces the masks.
        zero_init: which factor starts at zero, "v" or "u"; the other two are Xavier uniform, sigma slice by slice.
        backend: a name from :func:`efft_kernels.backends`, or None for the fastest that is proven.

    Attributes:
        weight [out_features, in_features], bias [out_features] or None: frozen; set requires_grad to train them.
        u [in_features, r1], sigma [slices, r1, r2], v [r2, out_features / slices]: trained.

    Raises:
        ValueError: a rank, slices, scale, factor_dropout or zero_init outside what is stated above.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int | tuple[int, int] = 16,
        scale: float = 1.0,
        slices: int = 1,
        factor_dropout: float = 0.0,
        zero_init: Literal["v", "u"] = "v",
        backend: str | None = None,
        device=None,
        dtype=None,
    ):
        r1, r2 = _check(in_features, out_features, rank, scale, slices, factor_dropout, zero_init)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.scale, self.factor_dropout, self.zero_init, self.backend = scale, factor_dropout, zero_init, backend
        self.u = nn.Parameter(torch.empty(in_features, r1, **like))
        self.sigma = nn.Parameter(torch.empty(slices, r1, r2, **like))
        self.v = nn.Parameter(torch.empty(r2, out_features // slices, **like))
        self.reset_factors()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> "EFFTLinear":
        """An EFFTLinear around the weight and bias of a Linear: the same Parameter objects, frozen, not copies.

        Args:
            linear: an nn.Linear with plain parameters.
            options: rank, scale, slices, factor_dropout, zero_init, backend as in the constructor.

        Raises:
            TypeError: not exactly an nn.Linear (a subclass may compute something else), or a parametrized one.
            ValueError: as the constructor.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear must be an nn.Linear, not a subclass, got {type(linear).__name__}")
        if not isinstance(linear._parameters.get("weight"), nn.Parameter):
            raise TypeError("linear must own its weight as a plain parameter, got a parametrized or normed weight")
        if not linear.weight.dtype.is_floating_point:
            raise TypeError(f"linear must have a floating-point weight, got {linear.weight.dtype}")
        # built without storage for weight and bias: the Linear's own take their place
        self = cls(linear.in_features, linear.out_features, False, device="meta", dtype=linear.weight.dtype, **options)
        self.weight, self.bias = linear.weight, linear.bias
        for name in ("u", "sigma", "v"):
            setattr(self, name, nn.Parameter(torch.empty_like(getattr(self, name), device=linear.weight.device)))
        self.reset_factors()
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        return self.train(linear.training)

    @torch.no_grad()
    def reset_factors(self) -> None:
        """Draw u, sigma and v anew: one zero, the others Xavier uniform. The layer then equals its frozen Linear."""
        for name in ("u", "v"):
            factor = getattr(self, name)
            nn.init.zeros_(factor) if name == self.zero_init else nn.init.xavier_uniform_(factor)
        # slice by slice: on the whole tensor Xavier would read the trailing dimension as a receptive field
        for core in self.sigma:
            nn.init.xavier_uniform_(core)

    def forward(self, x: Tensor) -> Tensor:
        u, sigma, v = self.u, self.sigma, self.v
        if self.training and self.factor_dropout:
            u, sigma, v = (F.dropout(factor, self.factor_dropout) for factor in (u, sigma, v))
        return efft_linear(x, self.weight, self.bias, u, sigma, v, self.scale, backend=self.backend)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain nn.Linear with the update added to a copy of the weight; this layer stays as it is.

        Rounded once to the dtype of the weight: for bfloat16 or float16 weights most of a small update is lost by that,
        which ``layer.float().merge()`` avoids.
        """
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta", dtype=self.weight.dtype)
        linear.weight = nn.Parameter(self.weight.detach().clone(), self.weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        up = group_update(self.sigma, self.v, self.scale, backend=self.backend)
        merge_([linear.weight], [self.u], [up.transpose(0, 1).flatten(1)], backend=self.backend)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        slices, r1, r2 = self.sigma.shape
        rank = r1 if r1 == r2 else (r1, r2)
        return f"{super().extra_repr()}, rank={rank}, scale={self.scale}, slices={slices}"


def _check(in_features, out_features, rank, scale, slices, factor_dropout, zero_init) -> tuple[int, int]:
    """(r1, r2), or a ValueError that names the argument"""
    if not isinstance(slices, int) or slices < 1 or out_features % slices:
        raise ValueError(f"slices must be a positive divisor of out_features={out_features}, got {slices!r}")
    ranks = rank if isinstance(rank, tuple) else (rank, rank)
    largest = min(in_features, out_features // slices)
    if len(ranks) != 2 or not all(isinstance(r, int) and 1 <= r <= largest for r in ranks):
        raise ValueError(f"rank must be an int or a pair of ints from 1 to {largest}, got {rank!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if not 0 <= factor_dropout < 1:
        raise ValueError(f"factor_dropout must be in [0, 1), got {factor_dropout}")
    if zero_init not in ("v", "u"):
        raise ValueError(f"zero_init must be 'v' or 'u', got {zero_init!r}")
    return ranks


class _Pass:
    """One forward of the model: its pairs, and the layers that ran in it without recording a graph."""

    def __init__(self, pairs: dict[str, Pair], recorded: bool):
        self.pairs, self.recorded = pairs, recorded
        self.unrecorded: set[str] = set()


class Adapters(nn.ModuleDict):
    """The adapters of one model, by name: each a ModuleDict of groups. Registered on the model, once, as ``efft``.

    How a layer gets its (down, up). A hook before the model's forward computes the pairs of all groups at once and
    lays them out here; the AdaptedLinears pick theirs up by path; a hook after the forward takes them away, so nothing
    outlives the factors, dropout masks and grad mode it was made of. Every forward with gradients makes its own pairs:
    accumulation, several forwards before a backward, and optimizer steps in between need no further care. A layer that
    runs outside the model's forward (``forward_features``, one block) computes its own pair, with a graph of its own.
    Backward may run layers again, to recompute a checkpointed block: when a gradient reaches the output of a forward,
    its pairs are laid out for the rest of that backward, so that the recomputation sees the same factors and masks.
    Without gradients and dropout the pairs are kept until a factor is another tensor or has another version. Writes
    through ``.data`` and fused optimizers leave no trace in the version: so ``train()`` and ``eval()`` forget pairs,
    and none are kept from a forward with gradients to the next of these calls, or while a factor has a ``.grad``.
    """

    def __init__(self, backend: str | None = None, still: tuple[nn.Module, ...] = ()):
        super().__init__()
        self.backend = backend
        self.active: str | None = None
        self.still = still  # modules that stay in eval mode: frozen batch norms; a tuple does not register them
        self.flags: dict[str, bool] = {}  # which parameters of the model were trained before it was injected
        self.hooks: tuple = ()  # on the model, around its forward
        self._forget()

    def _forget(self) -> None:
        self._pass = None  # of the forward under way
        self._replay = (-1, None)  # (backward, the forward that it recomputes)
        self._kept = None  # (what they depend on, pairs)
        self._settled = True  # no forward with gradients since the last train() or eval()

    def train(self, mode: bool = True) -> "Adapters":
        super().train(mode)
        self._kept, self._settled = None, True
        for module in self.still:
            module.eval()
        return self

    def __getstate__(self) -> dict:
        # tensors with a graph can be neither copied nor pickled
        return {**self.__dict__, "_pass": None, "_replay": (-1, None), "_kept": None}

    def groups(self) -> list[nn.Module]:
        """of the active adapter"""
        return [] if self.active is None else list(self[self.active].values())

    def pair(self, path: str) -> Pair | None:
        """What the Linear at this path adds now, or None."""
        now = self._pass
        if now is None and self.active is not None and not torch.compiler.is_compiling():
            task, replayed = self._replay
            now = replayed if task != -1 and task == torch._C._current_graph_task_id() else None
        if now is None:
            return self._alone(path)
        if now.recorded and not torch.compiler.is_compiling():
            if self._pass is not None and not torch.is_grad_enabled():
                now.unrecorded.add(path)
            elif self._pass is None and path in now.unrecorded:
                # recorded only now, in backward: reentrant checkpointing, whose graph must not share the forward's
                if any(group.drops for group in self.groups()):
                    raise RuntimeError(
                        "factor dropout cannot be reproduced under reentrant checkpointing: use use_reentrant=False, "
                        "or factor_dropout=0"
                    )
                return self._alone(path)
        return now.pairs.get(path)

    def _alone(self, path: str) -> Pair | None:
        for group in self.groups():
            if path in group.slots:
                if self._constant():
                    return self.pairs()[path]
                self._settled = False
                return group.hand_out([group.slots[path]], self.backend)[path]
        return None

    def _constant(self) -> bool:
        """whether the pairs are a function of the factors alone, and no graph is needed"""
        return not any(group.drops for group in self.groups()) and not self._recording()

    def _recording(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for group in self.groups() for p in group.parameters())

    def pairs(self, keep: bool = True) -> dict[str, Pair]:
        """path -> pair of every Linear of the active adapter, kept for the next call where they cannot have changed."""
        groups = self.groups()
        if not self._constant():
            self._settled = False
        keep = keep and not torch.compiler.is_compiling() and self._settled
        factors = [t for group in groups for t in (*group.parameters(), *group.buffers())] if keep else []
        # a CUDA graph must contain the update, and an inference tensor has no version
        if not factors or any(t.is_inference() or t.grad is not None for t in factors) or _capturing():
            return {path: pair for g in groups for path, pair in g.hand_out(g.slots.values(), self.backend).items()}
        device = factors[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        mode = self.active, autocast, torch.is_inference_mode_enabled()
        stamp = [(t, t.data_ptr(), t._version) for t in factors]
        if self._kept is not None:
            old_mode, old_stamp, _, pairs = self._kept
            if mode == old_mode and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(stamp, old_stamp)):
                return pairs
        pairs = {path: pair for g in groups for path, pair in g.hand_out(g.slots.values(), self.backend).items()}
        # the third entry keeps the old memory, so that no new factor can come to lie at the same address
        self._kept = mode, stamp, [t.detach() for t in factors], pairs
        return pairs

    def begin(self, keep: bool) -> None:
        """Lay out the pairs for a forward of the model. keep: whether versions can be trusted."""
        self._replay = (-1, None)
        if self.active is not None:
            self._pass = _Pass(self.pairs(keep), self._recording())

    def end(self, output) -> None:
        """Take them away, and bring them back when a gradient reaches the output."""
        done, self._pass = self._pass, None
        if done is not None and done.recorded and not torch.compiler.is_compiling():
            for t in _tensors(output):
                if t.requires_grad:
                    t.register_hook(partial(self._bring_back, done))

    def _bring_back(self, done: _Pass, grad: Tensor) -> None:
        self._replay = (torch._C._current_graph_task_id(), done)


class AdaptedLinear(nn.Linear):
    """A Linear of an injected model: y = x @ weight.T + bias + (x @ down) @ up, where its model's Adapters say.

    Made by changing the class of an nn.Linear: its parameters, names, hooks and whoever refers to it stay as they are.
    """

    @staticmethod
    def adopt(linear: nn.Linear, path: str, adapters: Adapters) -> None:
        linear.__class__ = AdaptedLinear
        linear.efft = (adapters, path)  # a tuple, which registers nothing

    def release(self) -> None:
        """Back to the nn.Linear it was."""
        del self.efft
        self.__class__ = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        adapters, path = self.efft
        pair = adapters.pair(path)
        if pair is None:
            return F.linear(x, self.weight, self.bias)
        down, up, dropout = pair
        if down.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            down, up = down.to(self.weight.dtype), up.to(self.weight.dtype)
        if dropout and self.training:
            return F.linear(x, self.weight, self.bias) + F.dropout(x @ down, dropout) @ up
        return lowrank_linear(x, self.weight, self.bias, down, up, backend=adapters.backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, adapted={self.efft[0].active!r}"


def _tensors(tree):
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for branch in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(branch)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
