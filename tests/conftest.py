"""One small plan, one store of compiled kernels and one artifact of each generation, shared by all tests.

DeepGEMM and nvcc are the real ones. The legacy generation's copy is installed beside the environment by `make`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.common.cache import scratch_folder
from cachebuilder.compiling import check as code
from cachebuilder.compiling import record as build_record
from cachebuilder.cuda.processes import Processes
from cachebuilder.manifest.inputs import Inputs, load_manifest
from cachebuilder.planning.plan import Kernel
from cachebuilder.restoring.machine import Machine
from tests.registries import Registry, registry

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "manifests"
LEGACY = Path(os.environ.get("CACHEBUILDER_TEST_LEGACY", f"{sys.prefix}/legacy")) / "deep_gemm"

#: What the manifests of the tests are for; `tests/gpu/run.sh` names the card that is there.
TARGET = os.environ.get("CACHEBUILDER_TEST_GPU", "H200")
SMALL = f"""\
name: small
target: {{gpu: {TARGET}}}
max_tokens: 40
ops:
  - {{op: fp8_gemm_nt, n: 576, k: 512}}
  - {{op: m_grouped_fp8_gemm_nt_contiguous, experts: 2, topk: 1, n: 256, k: 512}}
"""


def check_code(kernels: Iterable[Kernel], cubins: Mapping[str, bytes], inputs: Inputs) -> None:
    """Each kernel's code must be what nvcc makes of it alone, called as DeepGEMM calls it."""
    with scratch_folder() as scratch:
        for kernel in kernels:
            own = code.compile_alone(kernel, inputs, Processes(), scratch)
            code.require_equal(kernel, own, cubins[kernel.entry])


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all of pytest-xdist's processes, or for the only one."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@contextmanager
def one_at_a_time(folder: Path, name: str) -> Iterator[None]:
    """Of the processes that share ``folder`` only one is inside; the others wait, and then find what it made."""
    with (folder / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_folder(shared_folder: Path) -> Path:
    """The user's cache folder, for this session only: tests neither use nor leave anything of the user's."""
    folder = shared_folder / "cache"
    folder.mkdir(exist_ok=True)
    os.environ["CACHEBUILDER_CACHE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of about seven kernels."""
    path = tmp_path_factory.mktemp("manifest") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="session")
def run() -> Run:
    """Run the command line as a person does."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cachebuilder", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What takes a DeepGEMM takes each generation's, or those of its module's GENERATIONS, or those of its own mark."""
    marked = any("deep_gemm" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "deep_gemm" in metafunc.fixturenames and not marked:
        generations = getattr(metafunc.module, "GENERATIONS", ("deepjit", "legacy"))
        metafunc.parametrize("deep_gemm", generations, indirect=True, scope="session")


@pytest.fixture(scope="session")
def deep_gemm(request: pytest.FixtureRequest) -> Path | None:
    """A copy of each generation: the installed one (None) unless another is named, and the legacy one."""
    if request.param == "deepjit":
        named = os.environ.get("CACHEBUILDER_TEST_DEEPJIT")
        return Path(named) if named else None
    assert LEGACY.is_dir(), f"wanted the legacy DeepGEMM in {LEGACY}; make installs it"
    return LEGACY


@pytest.fixture(scope="session")
def built(
    small: Path, deep_gemm: Path | None, shared_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> building.Built:
    """The small manifest, built for one generation; another process takes plan and kernels from the cache folder."""
    output = tmp_path_factory.mktemp("built") / "small.tar.zst"
    inputs = load_manifest(small, deep_gemm=deep_gemm)
    # The record of the build that compiled: the other processes' builds are all from the store.
    record = shared_folder / f"{inputs.installation.generation}.build.json"
    with one_at_a_time(shared_folder, "built"):
        done = building.build(inputs, output)
        if record.exists():
            shutil.copy(record, build_record.path_for(output))
        else:
            shutil.copy(build_record.path_for(output), record)
        return done


@pytest.fixture
def machine(built: building.Built) -> Machine:
    """The machine that the small artifact was built for: its DeepGEMM, no GPU in sight, no variables."""
    return Machine(built.inputs.installation)


@pytest.fixture
def artifact(built: building.Built, tmp_path: Path) -> Path:
    """A copy of the small artifact, for a test that puts something beside it or sends it somewhere."""
    path = tmp_path / "small.tar.zst"
    path.write_bytes(built.packed.path.read_bytes())
    return path


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry on loopback, for one module's tests."""
    with registry(tmp_path_factory.mktemp("registry")) as found:
        yield found
