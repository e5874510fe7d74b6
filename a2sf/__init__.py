"""A2SF Serve's core: scoring, eviction, the slot cache and the engine that decodes with it.

Owns the block law and everything that carries it out. Knows nothing of gRPC, Optuna or any
other way in: `service` and `tuner` sit on top of it, side by side.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("a2sf-serve")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
