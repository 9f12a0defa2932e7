"""``python -m cachebuilder``: the same as the ``cachebuilder`` command."""

from cachebuilder.cli import main

main()
