"""A program that uses torch, Triton and DeepGEMM in several processes, as an engine does; the tests observe it.

``small_engine.py [WORKERS [FUNCTION]]``: WORKERS is 2 unless given; with FUNCTION, the first worker begins with a call of
that function of the CUDA runtime.
"""

from __future__ import annotations

import multiprocessing
import sys


def worker(rank: int, function: str | None) -> None:
    from small_worker import work

    work(rank, function)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    function = sys.argv[2] if len(sys.argv) > 2 else None
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=worker, args=(rank, function if rank == 0 else None)) for rank in range(count)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    sys.exit(max(process.exitcode or 0 for process in workers))


if __name__ == "__main__":
    main()
