"""Calls every op's function of DeepGEMM as its ``prepare`` does, at the first and the last point; the tests observe it.

``python -m tests.every_op DEEP_GEMM ARCH GENERATION``
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch

from cachebuilder.ops.catalog import OPS
from cachebuilder.ops.device import Device
from tests import entry_points


def main(folder: str, arch: str, generation: str) -> None:
    sys.path.insert(0, str(Path(folder).parent))  # an engine imports its copy by name
    device = Device(torch, import_module("deep_gemm"), virtual=True)
    for fields in entry_points.ops(arch, generation):
        model = OPS[fields["op"]]
        more = {"max_tokens": 16} if "max_tokens" in model.model_fields else {}
        op = model.model_validate(more | fields)
        call, points = op.prepare(device), op.points(device)
        for point in (points[0], points[-1]):
            call(point)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
