"""Serving many adapters of one model: AdapterBank, and a deployment with Ray Serve around it (app.py)."""

from .bank import AdapterBank

__all__ = ["AdapterBank"]
