"""EFFTLinear: a Linear with its own tensor-train adapter, in place of nn.Linear."""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base_linears import add_low_rank, has_own_forward, kind, refusal
from .ops import check_backend, check_scale, efft_linear, group_update, merge_
from .precision import at_least, autocast_dtype, beside, check_factor_dtype, floor, without_autocast
from .wrappers import refuse_sharded


class EFFTLinear(nn.Linear):
    """y = x @ weight.T + bias + scale * x @ u @ sigma @ v, with weight and bias frozen and u, sigma, v trained.

    Equivalent to ``nn.Linear`` with weight + scale * (u @ [sigma[0] @ v, ..., sigma[S-1] @ v]).T (EFFT, arXiv
    2311.06749, section 3.2), which is never formed. At the start one factor is zero, so nothing changes.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        rank: of the adapter, an int or a pair (r1, r2); each from 1 to min(in_features, out_features / slices).
        scale: factor of the update, finite, within the range of float32 for all dtypes but float64.
        slices: S, the number of equal parts of the output, which share u and v and have one core each: 3 for a fused
            qkv. It divides out_features.
        factor_dropout: probability, in [0, 1), of dropping each entry of u, sigma and v while training, with a new mask
            per call. Masks come from torch's generator, so seeding it, or checkpointing, reproduces them.
        zero_init: the factor that starts at zero, "v" or "u"; the other two are Xavier uniform, sigma slice by slice.
        backend: a name from :func:`efft_kernels.backends`, or None for the fastest proven one.
        factor_dtype: of u, sigma and v. Float32, the default, keeps them float32 beside bfloat16 and float16 weights,
            also when the layer is cast to these later, and float64 beside float64 weights. They are cast to the dtype
            of the weight, or of autocast, where they are used.

    Attributes:
        weight [out_features, in_features], bias [out_features] or None: frozen; set requires_grad to train them.
        u [in_features, r1], sigma [slices, r1, r2], v [r2, out_features / slices]: trained.

    Raises:
        TypeError: dtype or factor_dtype is no floating-point dtype of the four above.
        ValueError: in_features, out_features, rank, slices, scale, factor_dropout, zero_init or backend is outside the
            range stated above.
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
        factor_dtype: torch.dtype = torch.float32,
    ):
        r1, r2 = _check(in_features, out_features, rank, slices, factor_dropout, zero_init)
        check_backend(backend)
        check_factor_dtype(factor_dtype)
        check_factor_dtype(dtype or torch.get_default_dtype(), "dtype")
        scale = check_scale(scale, dtype or torch.get_default_dtype())
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scale, self.factor_dropout, self.zero_init, self.backend = scale, float(factor_dropout), zero_init, backend
        self._make_factors((r1, r2), int(slices), self.weight.device, beside(self.weight.dtype, factor_dtype))

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> "EFFTLinear":
        """An EFFTLinear around the weight and bias of a Linear: the same Parameter objects, frozen, not copies.

        Args:
            linear: an nn.Linear with plain parameters, or with a weight quantized by torchao, whose forward then runs
                unchanged and has the update added to its result.
            options: rank, scale, slices, factor_dropout, zero_init, backend, factor_dtype as in the constructor.

        Raises:
            TypeError: linear is not exactly an nn.Linear (a subclass may compute something else), or is parametrized;
                inject takes the Linears of bitsandbytes and parametrized ones.
            ValueError: as the constructor.
        """
        if type(linear) is not nn.Linear:
            hint = "; inject adapts it within a model" if isinstance(linear, nn.Linear) and kind(linear) else ""
            raise TypeError(f"linear must be an nn.Linear, not a subclass, got {type(linear).__name__}{hint}")
        if not isinstance(linear._parameters.get("weight"), nn.Parameter):
            raise TypeError(
                "linear must own its weight as a plain parameter, got a parametrized or normed weight; inject adapts "
                "it within a model"
            )
        if reason := refusal(linear, nn.Linear):
            raise TypeError(f"linear {reason}")
        # built without storage for weight and bias, which the Linear's own replace
        self = cls(linear.in_features, linear.out_features, False, device="meta", dtype=linear.weight.dtype, **options)
        self.weight, self.bias = linear.weight, linear.bias
        slices, r1, r2 = self.sigma.shape
        self._make_factors((r1, r2), slices, linear.weight.device, self.u.dtype)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        return self.train(linear.training)

    @torch.inference_mode(False)  # an inference tensor could never be trained
    def _make_factors(self, rank: tuple[int, int], slices: int, device: torch.device, dtype: torch.dtype) -> None:
        like = {"device": device, "dtype": dtype}
        self._floor = floor(dtype)
        self.u = nn.Parameter(torch.empty(self.in_features, rank[0], **like))
        self.sigma = nn.Parameter(torch.empty(slices, *rank, **like))
        self.v = nn.Parameter(torch.empty(rank[1], self.out_features // slices, **like))
        self.no_fast_path = _NoFastPath()
        self.reset_factors()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EFFTLinear":
        # under longer names if parametrized or pruned
        name_of = lambda key: key.removeprefix("parametrizations.").split(".")[0].removesuffix("_orig")
        factors = [p for key, p in self.named_parameters() if name_of(key) in ("u", "sigma", "v")]
        of_factors = {id(t) for factor in factors for t in (factor, factor.grad)}
        wide = at_least(fn, self._floor)
        return super()._apply(lambda t: wide(t) if id(t) in of_factors else fn(t), recurse)

    def reset_parameters(self) -> None:
        """Initialise weight and bias as nn.Linear does, and the factors as :meth:`reset_factors` does."""
        super().reset_parameters()
        if "v" in self._parameters:  # nn.Linear's constructor calls this before there are factors
            self.reset_factors()

    @torch.no_grad()
    def reset_factors(self) -> None:
        """Initialise u, sigma and v: one zero, the others Xavier uniform. The layer then equals its frozen Linear."""
        for name in ("u", "v"):
            factor = getattr(self, name)
            nn.init.zeros_(factor) if name == self.zero_init else nn.init.xavier_uniform_(factor)
        # slice by slice: on the whole tensor Xavier would read the trailing dimension as a receptive field
        for core in self.sigma:
            nn.init.xavier_uniform_(core)

    def forward(self, x: Tensor) -> Tensor:
        own = self._parameters  # self.u would take a Python frame of nn.Module.__getattr__
        if "weight" in own and "bias" in own and "u" in own and "sigma" in own and "v" in own:
            weight, bias, u, sigma, v = own["weight"], own["bias"], own["u"], own["sigma"], own["v"]
        else:  # one is parametrized or pruned
            weight, bias, u, sigma, v = self.weight, self.bias, self.u, self.sigma, self.v
        if u.dtype != (dtype := weight.dtype):
            dtype = dtype if dtype == torch.float64 else autocast_dtype(x.device) or dtype
            u, sigma, v = u.to(dtype), sigma.to(dtype), v.to(dtype)
        if self.training and self.factor_dropout:
            u, sigma, v = _dropped(self.factor_dropout, u, sigma, v)
        if not u.is_cpu:
            u = u.mT.contiguous().mT  # the GPU kernels read it with K contiguous, in forward and backward
        if has_own_forward(self):
            return self._beside_own_forward(x, u, sigma, v)
        return efft_linear(x, weight, bias, u, sigma, v, self.scale, backend=self.backend)

    # apart, because a closure or super() in forward costs each call two microseconds
    def _beside_own_forward(self, x: Tensor, u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
        up = group_update(sigma, v, self.scale, backend=self.backend).transpose(0, 1).flatten(1)
        return add_low_rank(super().forward(x), x, u, up)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain nn.Linear with the update added to a copy of the weight; this layer does not change.

        The sum is rounded once to the dtype of the weight. With bfloat16 or float16 weights that loses most of a small
        update, which ``layer.float().merge()`` avoids.

        Raises:
            ValueError: the weight is quantized, so rounding the sum to its few bits would lose most of the update.
        """
        refuse_sharded(self, "merge")
        if has_own_forward(self):
            raise ValueError(f"the weight must be plain to be merged into, got {kind(self)}; dequantize it first")
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta", dtype=self.weight.dtype)
        linear.weight = nn.Parameter(self.weight.detach().clone(), self.weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        with without_autocast(self.u.device):
            up = group_update(self.sigma, self.v, self.scale, backend=self.backend).transpose(0, 1).flatten(1)
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            merge_([linear.weight], [self.u.to(wide)], [up.to(wide)], backend=self.backend)
        return linear.train(self.training)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        slices, r1, r2 = self.sigma.shape
        rank = r1 if r1 == r2 else (r1, r2)
        return f"{super().extra_repr()}, rank={rank}, scale={self.scale}, slices={slices}"


class _NoFastPath(nn.Module):
    """Keeps an nn.TransformerEncoderLayer around an EFFTLinear from reading its weight instead of calling it.

    In eval mode that layer has a fast path, which it does not take if any module in it has a hook. This one is never
    called, so its hook costs nothing.
    """

    def __init__(self):
        super().__init__()
        self.register_forward_pre_hook(_nothing)


def _dropped(probability: float, *factors: Tensor) -> list[Tensor]:
    return [F.dropout(factor, probability) for factor in factors]


def _nothing(module: nn.Module, args: tuple) -> None:
    pass


def _check(in_features, out_features, rank, slices, factor_dropout, zero_init) -> tuple[int, int]:
    """(r1, r2), or a ValueError that names the argument"""
    for name, features in (("in_features", in_features), ("out_features", out_features)):
        if isinstance(features, bool) or not isinstance(features, Integral) or features < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {features!r}")
    if isinstance(slices, bool) or not isinstance(slices, Integral) or slices < 1 or out_features % slices:
        raise ValueError(f"slices must be a positive divisor of out_features={out_features}, got {slices!r}")
    ranks = rank if isinstance(rank, tuple) else (rank, rank)
    largest = min(in_features, out_features // slices)
    numbers = all(isinstance(r, Integral) and not isinstance(r, bool) and 1 <= r <= largest for r in ranks)
    if len(ranks) != 2 or not numbers:
        raise ValueError(f"rank must be an int or a pair of ints from 1 to {largest}, got {rank!r}")
    if not (isinstance(factor_dropout, Real) and 0 <= factor_dropout < 1):
        raise ValueError(f"factor_dropout must be a number in [0, 1), got {factor_dropout!r}")
    if zero_init not in ("v", "u"):
        raise ValueError(f"zero_init must be 'v' or 'u', got {zero_init!r}")
    return int(ranks[0]), int(ranks[1])
