"""A2SF Serve's core: scoring, eviction, the slot cache and the engine that decodes with it.

Owns the block law and its implementations. Knows nothing of gRPC or Optuna: `service` and `tuner`
both build on this package, and neither imports the other.
"""

from importlib.metadata import PackageNotFoundError, version


def _version() -> str:
    # The client's own package brings a part of this one.
    for distribution in ("a2sf-serve", "a2sf-client"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "0+unknown"  # run from a source tree that was never installed


__version__ = _version()

__all__ = ["__version__"]
