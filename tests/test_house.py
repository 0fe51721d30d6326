"""The limits that .ci/sizes.py holds the repository to."""

import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIZES = runpy.run_path(str(ROOT / ".ci" / "sizes.py"))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_this_repository_is_within_the_limits():
    assert SIZES["problems"]() == []


def test_what_exceeds_a_limit_is_named(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "efft_kernels").mkdir()
    (tmp_path / "efft_kernels" / "long.py").write_text("\n" * 501)
    (tmp_path / "large.csv").write_text("x" * 500_001)
    (tmp_path / "long.json").write_text("\n" * 60_000)
    assert SIZES["problems"](tmp_path) == [
        "efft_kernels/long.py has 501 lines, at most 500 are allowed in a file of the package",
        "large.csv has 500,001 bytes, at most 500,000 are allowed",
        "the files have 60,501 lines together, at most 60,000 are allowed",
    ]
