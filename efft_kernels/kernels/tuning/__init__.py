"""Proof and tuning of the kernels on the device at hand: ``python -m efft_kernels.tune``, or :func:`tune`."""

from collections.abc import Iterable

import torch


def tune(
    shapes: Iterable[tuple[int, ...]],  # (M, K, N, R) of each low-rank linear, (M, K, N, R, A, B) of a mixed batch
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    **options,
):
    """Prove, time and choose kernels for these shapes; :func:`efft_kernels.kernels.tuning.run.tune` has the options."""
    from .run import tune

    return tune(shapes, dtypes, **options)
