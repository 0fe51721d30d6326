"""Progress bars."""

import sys

from ..extras import need


def bar(show: bool, total: int, what: str, unit: str, done: int = 0):
    """A tqdm progress bar, updated rarely where the output is not a terminal."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return need("tqdm").tqdm(
        total=total, initial=done, desc=what, unit=unit, disable=not show, mininterval=interval, dynamic_ncols=True
    )
