"""Makes this process one rank of as many as it asks for, or one of as many processes, whose GPUs send nothing."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any


def one_rank_of_many(module: ModuleType) -> None:
    """Make this process one rank of as many as it asks for: each process group is one that does nothing.

    torch's own FakeProcessGroup stands for the other ranks (``torch/testing/_internal/distributed/fake_pg.py``).
    """
    init, new_group = module.init_process_group, module.new_group

    def init_process_group(*args: Any, rank: int = 0, world_size: int = 1, **kwargs: Any) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        init(backend="fake", rank=rank, world_size=world_size, store=FakeStore())

    def new_fake_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        return new_group(ranks, backend="fake")

    module.init_process_group, module.new_group = init_process_group, new_fake_group  # type: ignore[attr-defined]
    module.monitored_barrier = lambda *args, **kwargs: None  # type: ignore[attr-defined] # only gloo has one


def silent_gpus(module: ModuleType) -> None:
    """Make each group of GPUs one that does nothing, while the processes of all ranks talk to each other by gloo."""
    init, new_group = module.init_process_group, module.new_group

    def init_process_group(*args: Any, backend: Any = None, pg_options: Any = None, **kwargs: Any) -> None:
        import torch.testing._internal.distributed.fake_pg  # noqa: F401 # registers "fake"

        init("cpu:gloo,cuda:fake", **kwargs)

    def new_silent_group(
        ranks: Any = None, *args: Any, backend: Any = None, pg_options: Any = None, **kwargs: Any
    ) -> Any:
        return new_group(ranks, *args, backend=backend if backend == "gloo" else "fake", **kwargs)

    module.init_process_group, module.new_group = init_process_group, new_silent_group  # type: ignore[attr-defined]


def all_ranks_on_this_machine(module: ModuleType) -> None:
    """Answer for all ranks: vLLM asks each where it runs (``vllm/distributed/parallel_state.py``, 0.25.0)."""
    module.in_the_same_node_as = lambda group, source_rank=0: [True] * group.size()  # type: ignore[attr-defined]


def plain_memory(module: ModuleType) -> None:
    """Make symmetric memory of this rank's own: mega-MoE's buffer (``torch/distributed/_symmetric_memory``)."""
    import torch

    def rendezvous(memory: Any, group: Any) -> SimpleNamespace:
        return SimpleNamespace(buffer_ptrs=[memory.data_ptr()] * group.size(), barrier=lambda: None)

    module.empty, module.rendezvous = torch.empty, rendezvous  # type: ignore[attr-defined]


def no_message_queue(module: ModuleType) -> None:
    """Make no queue in shared memory: it would wait for a reader in each rank (vLLM 0.25.0 ``shm_broadcast.py``)."""
    module.MessageQueue.create_from_process_group = staticmethod(lambda *args, **kwargs: None)
