"""Every op's trial on the virtual GPU: DeepGEMM's own host code, and torch on the CPU.

``python -m tests.trials_on_virtual_gpu DEEP_GEMM FIELDS`` tries each op of FIELDS (JSON) once and prints a summary of its
outputs. The virtual GPU's memory is the host's, and no kernel runs there: `OnCpu` runs torch's operations on the CPU in
that memory. Inputs and expected results are therefore real; DeepGEMM's kernels write nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from cachebuilder.ops.catalog import OPS
from cachebuilder.ops.device import Device
from cachebuilder.sweep.loading import import_package


def shared(value: Any) -> Any:
    """A CPU tensor in the same memory, if ``value`` is a tensor on the virtual GPU; else ``value``."""
    if not isinstance(value, torch.Tensor) or not value.is_cuda:
        return value
    storage = value.untyped_storage()
    if not storage.nbytes():
        return torch.empty(value.shape, dtype=value.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(value.dtype)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset())


class OnCpu(TorchDispatchMode):
    """Runs operations on the virtual GPU's tensors on the CPU; leaves views and allocations to torch."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled, and to be skipped by dynamo is to import it, which takes as long as torch itself."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.generators: dict[torch.Generator, torch.Generator] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        returned = function._schema.returns
        aliased = returned[0].alias_info if returned else None
        if (
            function.namespace == "deep_gemm"
            or function.overloadpacket._qualified_op_name.startswith("aten::empty")
            or (aliased is not None and not aliased.is_write)
        ):
            return function(*arguments, **options)
        tensors = [value for value in tree_leaves((arguments, options)) if isinstance(value, torch.Tensor)]
        device = options.get("device")
        on_gpu = any(value.is_cuda for value in tensors) if device is None else torch.device(device).type == "cuda"
        options = tree_map(self.on_cpu, options)
        if device is not None:
            options["device"] = "cpu"
        result = function(*tree_map(self.on_cpu, arguments), **options)
        if not on_gpu:
            return result
        if aliased is not None:  # it wrote into one of its arguments
            return next(value for value in tensors if value.is_cuda)
        return tree_map(moved, result)

    def on_cpu(self, value: Any) -> Any:
        if isinstance(value, torch.Generator) and value.device.type == "cuda":
            return self.generators.setdefault(value, torch.Generator().manual_seed(value.initial_seed()))
        return shared(value)


def moved(value: Any) -> Any:
    """A copy of ``value`` on the virtual GPU, if it is a tensor elsewhere; else ``value``."""
    if not isinstance(value, torch.Tensor) or value.is_cuda:
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    shared(copy).copy_(value)
    return copy


def summary(device: Device, fields: dict[str, Any]) -> Any:
    """Facts of each output of one trial; None for an op that has no reference."""
    model = OPS[fields["op"]]
    op = model.model_validate(({"max_tokens": 16} if "max_tokens" in model.model_fields else {}) | fields)
    points = op.points(device)
    try:
        trial = op.trial(device, points[min(2, len(points) - 1)], seed=1)
    except NotImplementedError:
        return None
    return [
        {
            "name": output.name,
            "actual": list(output.actual.shape),
            "expected": list(output.expected.shape),
            "finite": bool(output.expected.masked_fill(~output.written, 0.0).isfinite().all()),
            "size": float(output.expected.masked_fill(~output.written, 0.0).norm()),
            "problem": output.problem(),
        }
        for output in trial.outputs
    ]


def main(deep_gemm: str, ops: str) -> None:
    device = Device(torch, import_package("deep_gemm", deep_gemm))
    with torch.no_grad(), OnCpu():
        summaries = [summary(device, fields) for fields in json.loads(ops)]
    print(json.dumps(summaries), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
