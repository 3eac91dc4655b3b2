"""The `hf-geoscale` command. Commands import what they need when they run, so that --help is instant."""

from .app import app

__all__ = ["app"]
