"""How each child process of this folder starts.

``python -m cachebuilder.sweep.program MODULE FOLDER`` does the job in FOLDER with ``cachebuilder.sweep.MODULE``.
"""

from __future__ import annotations

import sys
from importlib import import_module

from cachebuilder.sweep import torch_import

if __name__ == "__main__":
    torch_import.begin()
    import_module(f"cachebuilder.sweep.{sys.argv.pop(1)}").start()
