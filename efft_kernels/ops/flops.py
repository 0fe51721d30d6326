"""What torch.utils.flop_counter counts for the operators: two FLOPs for each multiply-add of their products.

The counter calls a formula with the arguments of an operator, with their shapes in place of the tensors. It is told of
the formulas when somebody imports it: its module imports triton, which importing this package must not.
"""

import importlib.abc
import importlib.util
import math
import sys

import torch

COUNTER = "torch.utils.flop_counter"


def _products(rows: int, *pairs: tuple[int, int]) -> int:
    return 2 * rows * sum(a * b for a, b in pairs)


def _linear(x, weight, bias, down, up, *_, **__) -> int:
    (N, K), R = weight, up[-2]
    return _products(math.prod(x[:-1]), (K, R), (N, K), (R, N))


def _linear_backward(dy, x, weight, down, up, p, *rest, **__) -> int:
    (N, K), R = weight, up[-2]
    need_x, need_weight, _, need_down, need_up = next(part for part in rest if isinstance(part, list))
    counted = {
        "dp": (need_x or need_down, (N, R)),
        "dy @ weight": (need_x, (N, K)),
        "dp @ down.T": (need_x, (R, K)),
        "dweight": (need_weight, (N, K)),
        "ddown": (need_down, (K, R)),
        "dup": (need_up, (R, N)),
    }
    return _products(math.prod(dy[:-1]), *(pair for need, pair in counted.values() if need))


def _update(sigma, v, *_, **__) -> int:
    S, P, Q = sigma
    return _products(S, (P * Q, v[1]))


def _update_backward(dup, sigma, v, scale, needs, *_, **__) -> int:
    return sum(needs) * _update(sigma, v)


def _merge(weights, downs, ups, *_, **__) -> int:
    return sum(_products(N, (K, down[1])) for (N, K), down in zip(weights, downs))


FORMULAS = {
    "lowrank_linear": _linear,
    "lowrank_linear_backward": _linear_backward,
    # as if every sample had an adapter: which of them have none is not read back from the device
    "mixed_linear": _linear,
    "mixed_linear_backward": _linear_backward,
    "group_update": _update,
    "group_update_backward": _update_backward,
    "merge_": _merge,
}


def register() -> None:
    """Tell the counter of the operators, which are defined by now, at once or as soon as it is imported."""
    if COUNTER in sys.modules:
        _register_in(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Awaiting())


def _register_in(counter) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.efft_kernels, name))(formula)


class _Awaiting(importlib.abc.MetaPathFinder):
    """Finds the counter's module once, as Python would, and adds the formulas after it has run."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def run_and_register(module) -> None:
            run(module)
            _register_in(module)

        spec.loader.exec_module = run_and_register
        return spec
