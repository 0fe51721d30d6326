"""Many adapters of one model: AdapterBank for one process, and an HTTP service on Ray Serve built on it (app.py)."""

from .bank import AdapterBank

__all__ = ["AdapterBank"]
