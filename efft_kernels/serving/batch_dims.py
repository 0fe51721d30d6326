"""Where the Linears of a bank have the batch: found by a forward in which all samples but the first are NaN."""

import copy
import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


class Trial:
    """Such a forward, of which the Linears see this object as their use.

    NaN marks the rows of the other samples wherever the model puts them. Shapes would not tell: 50 rows may be the
    tokens of a sequence or the windows of 5 samples. Nothing is found where NaN reaches the first sample, as by a
    BatchNorm without statistics; it is not tried where no input can be NaN (:func:`markable`).
    """

    def __init__(self, bank, batch: int):
        self.bank, self.batch = bank, batch
        self.dims: dict[str, set[int]] = {}

    @torch.compiler.disable
    def run(self, args: tuple, kwargs: dict) -> dict[str, int | None] | None:
        """path -> the dimension of its input, 0 or 1, in which the samples follow each other; None if in neither.

        Returns:
            None if nothing is found.
        """
        model = self.bank.model
        training = [module for module in model.modules() if module.training]
        for module in training:  # BatchNorm would keep NaN in its statistics
            module.training = False
        try:
            args, kwargs = tree_map(self._with_nan, (args, kwargs))
            with torch.no_grad():
                found = model.forward(*args, **kwargs)  # without the model's hooks
        finally:
            for module in training:
                module.training = True
        outputs = [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.shape[:1] == (self.batch,)]
        if any(t[0].isnan().any() for t in outputs):
            return None
        return {path: min(dims, default=None) for path, dims in self.dims.items()}

    def _with_nan(self, t):
        if not isinstance(t, Tensor):
            return copy.deepcopy(t)  # such as a cache, which a forward changes
        if not markable(t, self.batch):
            return t
        return torch.cat([t[:1].nan_to_num(0.0, 0.0, 0.0), torch.full_like(t[1:], float("nan"))])

    def linear(self, layer: nn.Linear, path: str, x: Tensor, weight: Tensor, bias: Tensor | None, *columns) -> Tensor:
        parts = {dim: divmod(x.shape[dim], self.batch) for dim in range(min(2, x.dim() - 1))}
        fit = {d for d, (rows, rest) in parts.items() if not rest and not x.narrow(d, 0, rows).isnan().any()}
        self.dims[path] = self.dims.get(path, fit) & fit
        return F.linear(x, weight, bias)

    def head(self, layer: nn.Linear, path: str, x: Tensor) -> Tensor:
        return self.linear(layer, path, x, layer.weight, layer.bias)


def markable(given, batch: int) -> bool:
    """Whether a tensor among these has the samples, and can be NaN"""
    return any(isinstance(t, Tensor) and t.is_floating_point() and t.shape[:1] == (batch,) for t in tree_leaves(given))


def batch_dim(dims: Mapping[str, int | None] | None, path: str, x: Tensor, batch: int) -> int:
    """The dimension in which x, the input of the Linear at this path, has the samples; a ValueError if in none.

    dims: of :meth:`Trial.run`. A Linear that the trial did not call has them where all others have; where nothing was
    found, the first dimension is taken, with a warning if the second may be that of the samples.
    """
    where = f"{path} gets x {list(x.shape)}"
    if dims is not None and path not in dims and len(set(dims.values())) != 1:
        raise ValueError(f"{where} before a forward of the model has shown where it has the {batch} samples")
    dim = 0 if dims is None else dims.get(path, next(iter(dims.values())))
    if dim is None or x.dim() < dim + 2 or x.shape[dim] % batch:
        raise ValueError(
            f"{where}, whose first or second dimension must be the batch of {batch} samples, or a multiple of it with "
            "the rows of each together, for each sample to have its own adapter"
        )
    # [B, L, K] is usual, whatever L is
    if dims is None and x.dim() > 2 and not x.shape[1] % batch and (x.shape[0] != batch or x.shape[1] == batch):
        warnings.warn(
            f"a Linear gets {list(x.shape)}, and nothing has shown which dimension has the {batch} samples, as inputs "
            "of integers cannot: the first is taken",
            stacklevel=2,
        )
    return dim
