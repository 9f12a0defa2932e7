"""cachebuilder: DeepGEMM's JIT kernel cache, built ahead of time.

    import cachebuilder

    inputs = cachebuilder.load_manifest("manifests/quickstart.yaml")
    plan = cachebuilder.plan(inputs)
    print(len(plan.kernels), "kernels")
    built = cachebuilder.build(inputs, "out.tar.zst")
    restored = cachebuilder.restore(["out.tar.zst"], "/opt/deep_gemm")
    report = cachebuilder.verify("/opt/deep_gemm")

Every name in ``__all__`` is stable: a change that breaks a program raises the version (docs/versions.md). All other
modules are internal. Importing this package imports nothing else; a name is loaded when it is first used.

Every expected failure is a `CacheBuilderError` of the kind that says what failed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from cachebuilder.common.version import __version__

if TYPE_CHECKING:
    from cachebuilder.artifact.trust import Trust
    from cachebuilder.building import Built, build, plan
    from cachebuilder.common.progress import Progress
    from cachebuilder.compiling.compiler import CompileOptions
    from cachebuilder.errors import (
        ArtifactError,
        CacheBuilderError,
        CompatibilityError,
        CompileError,
        DeviceError,
        InstallationError,
        ManifestError,
        PlanError,
        RestoreError,
        SignatureError,
        StoreError,
        ToolchainError,
        TransferError,
        VerifyError,
    )
    from cachebuilder.manifest.inputs import Inputs, load_manifest
    from cachebuilder.planning.plan import Kernel, Plan
    from cachebuilder.restoring.machine import Machine
    from cachebuilder.restoring.restore import Restored, restore
    from cachebuilder.ship.shared import SharedStore, open_store
    from cachebuilder.verifying.report import Report
    from cachebuilder.verifying.verify import verify

#: The module of each public name.
_MODULES = {
    "building": ("Built", "build", "plan"),
    "common.progress": ("Progress",),
    "compiling.compiler": ("CompileOptions",),
    "errors": (
        *("ArtifactError", "CacheBuilderError", "CompatibilityError", "CompileError", "DeviceError"),
        *("InstallationError", "ManifestError", "PlanError", "RestoreError", "SignatureError", "StoreError"),
        *("ToolchainError", "TransferError", "VerifyError"),
    ),
    "manifest.inputs": ("Inputs", "load_manifest"),
    "planning.plan": ("Kernel", "Plan"),
    "artifact.trust": ("Trust",),
    "restoring.machine": ("Machine",),
    "restoring.restore": ("Restored", "restore"),
    "ship.shared": ("SharedStore", "open_store"),
    "verifying.report": ("Report",),
    "verifying.verify": ("verify",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [  # a test holds it to _MODULES
    "ArtifactError",
    "Built",
    "CacheBuilderError",
    "CompatibilityError",
    "CompileError",
    "CompileOptions",
    "DeviceError",
    "Inputs",
    "InstallationError",
    "Kernel",
    "Machine",
    "ManifestError",
    "Plan",
    "PlanError",
    "Progress",
    "Report",
    "RestoreError",
    "Restored",
    "SharedStore",
    "SignatureError",
    "StoreError",
    "ToolchainError",
    "TransferError",
    "Trust",
    "VerifyError",
    "__version__",
    "build",
    "load_manifest",
    "open_store",
    "plan",
    "restore",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'cachebuilder' has no attribute {name!r}")
    value = getattr(import_module(f"cachebuilder.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
