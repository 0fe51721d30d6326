"""benchmarks/ and benchmarks/paper/ on the path, for the tests of what is there."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PAPER = BENCHMARKS / "paper"
sys.path += [str(BENCHMARKS), str(PAPER)]


def need(*modules: str) -> None:
    """Skip the test module where one of these is not installed."""
    for module in modules:
        pytest.importorskip(module)
