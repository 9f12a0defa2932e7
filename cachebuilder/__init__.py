"""cachebuilder: DeepGEMM's JIT kernel cache, built ahead of time.

The import of this package, and of everything but the sweep's child process, needs neither torch nor DeepGEMM.
"""

__version__ = "0.1.0"
