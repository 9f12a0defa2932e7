"""A stand-in for the package ``flashinfer-jit-cache``, from which FlashInfer loads modules without compiling anything.

FlashInfer looks for the package by name (``flashinfer/jit/env.py``): 0.6.13 asks it for one folder, 0.7.2.post1 for
*providers*, with their modules and architectures. The stand-in answers both. It works for a FlashInfer that is
installed read-only, where its own folder ``data/aot`` cannot be filled.
"""

from __future__ import annotations

#: The package's folder below the one that goes on ``PYTHONPATH``. The modules are in ``modules/``, beside the latter.
PACKAGE = "flashinfer_jit_cache"

_TEXT = '''\
"""FlashInfer's modules that cachebuilder built, in place of the package flashinfer-jit-cache.

Headers that they are built from: {headers}
"""

from pathlib import Path
from types import SimpleNamespace

__version__ = {version!r}
_FOLDER = Path(__file__).resolve().parents[2] / "modules"


def get_jit_cache_dir():
    """The folder of all modules, as FlashInfer up to 0.6 asks for it."""
    return str(_FOLDER)


def get_jit_cache_providers():
    """The same, as FlashInfer from 0.7 on asks for it."""
    return [
        SimpleNamespace(
            provider_id="cachebuilder",
            distribution="flashinfer-jit-cache",
            version=__version__,
            jit_cache_dir=str(_FOLDER),
            cuda_architectures=[{arch!r}],
            modules=[path.name for path in _FOLDER.iterdir()],
        )
    ]
'''


def text(version: str, arch: str, headers: str) -> str:
    """The stand-in's ``__init__.py``.

    Args:
        version: FlashInfer's, which the stand-in must have, too.
        arch: as nvcc names it, for example ``sm_90a``.
        headers: the digest of FlashInfer's headers, which tells stand-ins of other code apart.
    """
    return _TEXT.format(version=version, arch=arch.replace("_", ""), headers=headers)
