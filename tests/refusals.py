"""Calls that must be refused."""

import pytest


def refuses(error, says, call, /, *args, **options):
    """The call raises such an error, and its message is matched by ``says``."""
    __tracebackhide__ = True
    with pytest.raises(error, match=says):
        call(*args, **options)
