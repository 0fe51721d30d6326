"""The operators: argument checks, choice of a backend, shapes for tracing, autocast and gradients.

One file per operator. Each is registered with torch as ``torch.ops.efft_kernels.<name>``. A call passes through

    autocast   casts the inputs of a forward to the autocast dtype
    autograd   records one node, which saves only what the requested gradients read
    compute    checks the arguments, chooses a backend and calls it (the backends' contract: kernels/__init__.py)

The functions here, ``torch.ops.efft_kernels.*`` and compiled graphs therefore behave alike.
"""

from .checks import check_scale
from .dispatch import Backend, backends, check_backend
from .efft_linear import efft_linear
from .flops import register as _count_flops
from .group_update import group_update
from .lowrank_linear import lowrank_linear
from .merge import merge_
from .mixed_linear import mixed_linear
from .producers import know, rebuild_inputs

__all__ = [
    *("Backend", "backends", "check_backend", "check_scale"),
    *("efft_linear", "group_update", "lowrank_linear", "merge_", "mixed_linear"),
    *("know", "rebuild_inputs"),
]

_count_flops()
