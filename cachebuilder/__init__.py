"""cachebuilder: DeepGEMM's JIT kernel cache, built ahead of time."""

from cachebuilder.common.version import __version__

__all__ = ["__version__"]
