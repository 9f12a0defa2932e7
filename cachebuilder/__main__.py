"""``python -m cachebuilder``: the same as the ``cachebuilder`` command."""

from cachebuilder.cli.main import main

main()
