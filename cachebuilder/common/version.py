"""The release of cachebuilder; hatchling reads it for the package's own metadata."""

__version__ = "0.1.0"
