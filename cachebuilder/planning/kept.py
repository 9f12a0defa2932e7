"""Plans that are kept: in the user's cache folder, and where other builders keep theirs."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from importlib import metadata

from pydantic import ValidationError

from cachebuilder.common.cache import open_own, own_folder
from cachebuilder.common.code import code_digest
from cachebuilder.common.kept import touch
from cachebuilder.common.results import Results
from cachebuilder.errors import InstallationError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import Plan

#: The folders whose code decides what a plan holds: a plan that other code made is not reused.
CODE = ("common", "cuda", "deepgemm", "flashinfer", "manifest", "ops", "planning", "sweep", "virtual_gpu")
#: 20,000 kernels with their sources make about 100 MB.
_MAX_PLAN_BYTES = 1 << 30


def plan_key(inputs: Inputs) -> str:
    """sha256 over everything that a plan depends on, including this program's own code."""
    manifest, installation = inputs.manifest, inputs.installation
    facts = {
        "code": code_digest(CODE),
        "manifest": manifest.model_dump(mode="json", exclude={"name", "toolchain"}),
        "deep_gemm": [str(installation.imported_as), installation.code_digest, installation.headers_digest],
        "compiler": inputs.toolchain.version_text,
        "torch": _torch_version(),
        "python": platform.python_version(),
        "flashinfer": inputs.flashinfer and inputs.flashinfer.code_digest,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def shared_name(key: str) -> str:
    """The name of a plan in a store that several builders share."""
    return f"plans/{key}"


@dataclass(frozen=True)
class KeptPlans:
    """Where plans are kept, each under its `plan_key`.

    Attributes:
        own: keep them in the user's cache folder, and take them from there.
        shared: where other builders keep theirs; None for no such place.
    """

    own: bool = True
    shared: Results | None = None

    def get(self, key: str) -> Plan | None:
        """The plan; None if nobody has kept it, it cannot be read, or another user could have changed it."""
        plan = _parse(_read_own(key)) if self.own else None
        if self.shared is None:
            return plan
        name = shared_name(key)
        if plan is not None and self.shared.absent([name]):  # made before this store was shared
            self._share(key, plan)
        elif plan is None and (plan := _parse(self.shared.get([name]).get(name))) and self.own:
            _write_own(key, plan)
        return plan

    def put(self, key: str, plan: Plan) -> None:
        """Keep a plan.

        Raises:
            InstallationError: the user's cache folder cannot be written.
            TransferError: the shared store cannot be reached, or refuses.
            StoreError: the shared store has another plan under the same key.
        """
        if self.own:
            _write_own(key, plan)
        self._share(key, plan)

    def _share(self, key: str, plan: Plan) -> None:
        if self.shared is not None:
            same_everywhere = plan.model_copy(update={"peak_bytes": 0})  # the memory of a sweep differs each time
            self.shared.put(shared_name(key), same_everywhere.model_dump_json().encode())


def _parse(data: bytes | None) -> Plan | None:
    try:
        return Plan.model_validate_json(data) if data is not None else None
    except ValidationError:
        return None


def _read_own(key: str) -> bytes | None:
    with open_own("plans") as folder:
        name = f"{key}.json"
        data = folder.read_safe(name, _MAX_PLAN_BYTES)
        touch(folder.path / name)
    return data


def _write_own(key: str, plan: Plan) -> None:
    plan.write(own_folder("plans") / f"{key}.json", InstallationError)


def _torch_version() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None
