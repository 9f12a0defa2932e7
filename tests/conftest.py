"""What all tests share: one small plan, one store of compiled kernels, and one artifact of each generation.

DeepGEMM and nvcc are the real ones. `make` installs the legacy generation's DeepGEMM inside the environment's folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.locks import lock
from cachebuilder.compiling import check as code
from cachebuilder.compiling import record as build_record
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.compiling.store import CubinStore
from cachebuilder.cuda.processes import Processes
from cachebuilder.cuda.toolchain import host_compiler_text
from cachebuilder.manifest.inputs import Inputs, load_manifest
from cachebuilder.planning.plan import Kernel
from cachebuilder.restoring.machine import Machine
from cachebuilder.sweep import warm
from tests.command_line import cachebuilder
from tests.registries import Registry, registry

# A shell starts its background commands with SIGINT ignored, and every child would inherit that; tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests run in as many processes as there are cores. More threads of torch than one in each of them, and in each of
# their children, only wait for each other: references on the CPU took three times the CPU time.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "manifests"
LEGACY = Path(os.environ.get("CACHEBUILDER_TEST_LEGACY", f"{sys.prefix}/legacy")) / "deep_gemm"
#: FlashInfer as vLLM 0.25.0 brings it; `make` installs it beside the legacy DeepGEMM.
FLASHINFER = Path(f"{sys.prefix}/flashinfer") / "flashinfer"

#: The GPU in the tests' manifests; `tests/gpu/run.sh` sets it to the card of the machine.
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
    """Raise `CompileError` if a kernel's code is not what nvcc makes of it alone, called as DeepGEMM calls it."""
    nvcc = inputs.toolchain.version_text, host_compiler_text(), inputs.installation.include_digest
    store = kept_cubins("alone")
    with scratch_folder() as scratch:
        for kernel in kernels:
            # Everything that this cubin depends on; no code of cachebuilder is among it.
            key = hashlib.sha256(json.dumps([*nvcc, kernel.flags, kernel.source]).encode()).hexdigest()
            if (own := store.get(key)) is None:
                own = code.compile_alone(kernel, inputs, Processes(), scratch)
                store.put(key, own)
            code.require_equal(kernel, own, cubins[kernel.entry])


def kept_cubins(name: str) -> CubinStore:
    """A store that outlives the session if ``CACHEBUILDER_TEST_STORE`` names a folder, as it does for `make test`.

    A cubin is found there only if the compilers, DeepGEMM's headers, the flags and the source are the same. For a cubin
    that cachebuilder made, so must be all code of cachebuilder that makes cubins.
    """
    folder = os.environ.get("CACHEBUILDER_TEST_STORE")
    return CubinStore(Path(folder, name)) if folder else CubinStore()


#: The files with tests of more than ten seconds, those with the longest first.
LONGEST = (
    "test_flashinfer_served.py",
    "test_entry_points.py",
    "test_docs.py",
    "test_observe.py",
    "test_build.py",
    "test_record.py",
    "test_compile.py",
    "test_front_end.py",
    "test_container.py",
    "test_misses.py",
    "test_frozen.py",
    "test_fleet.py",
    "test_fleet_ray.py",
)

Run = Callable[..., subprocess.CompletedProcess[str]]
BuildSmall = Callable[[Path | None], building.Built]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of pytest-xdist; without pytest-xdist, this process's folder."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@contextmanager
def one_at_a_time(folder: Path, name: str) -> Iterator[None]:
    """Let only one of the processes that share ``folder`` into the context at a time."""
    with (folder / f"{name}.lock").open("w") as file:
        assert lock(file.fileno(), wait=True)
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_folder(shared_folder: Path) -> Path:
    """A cache folder for this session only: tests neither use nor change the user's own."""
    folder = shared_folder / "cache"
    folder.mkdir(exist_ok=True)
    os.environ["CACHEBUILDER_CACHE_DIR"] = str(folder)
    return folder


def own_cache(folder: Path) -> Path:
    """Make ``folder`` a cache folder that holds nothing but the session's C libraries; returns it.

    To compile the virtual GPU's library takes as long as a sweep with its import of torch.
    """
    folder.mkdir()
    for name in ("virtual-gpu", "front-end"):
        if (made := Path(os.environ["CACHEBUILDER_CACHE_DIR"], name)).is_dir():
            shutil.copytree(made, folder / name)
    return folder


@pytest.fixture(scope="session", autouse=True)
def import_torch_once() -> Iterator[None]:
    """The tests' sweeps are forks of one process that has imported torch, as those of `verify` are."""
    with warm.kept():
        yield


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of about seven kernels."""
    path = tmp_path_factory.mktemp("manifest") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A manifest of one kernel."""
    path = tmp_path / "tiny.yaml"
    op = "{op: get_mn_major_tma_aligned_tensor, columns: 4}"
    path.write_text(f"name: tiny\ntarget: {{gpu: {TARGET}}}\nmax_tokens: 16\nops: [{op}]\n")
    return path


@pytest.fixture(scope="session")
def run() -> Run:
    """Run the command line as a user does (`tests/command_line.py`)."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return cachebuilder(*arguments, environment=os.environ | environment)

    return run


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let every process start with the longest tests, so that none waits for them in the end.

    pytest-xdist's ``worksteal`` gives each process a run of consecutive tests, whose last ones other processes may take.
    The tests of the first file share one compilation of some minutes: one process has them all, and none waits for it.
    Every second process starts with the legacy generation, so that two processes do not wait for the same build.
    """
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    runs: list[list[pytest.Item]] = [[] for _ in range(processes)]
    for item in sorted(items, key=lambda item: ranks.get(item.path.name, len(ranks))):
        run = runs[0] if item.path.name == LONGEST[0] else min(runs, key=len)
        run.append(item)
    for run in runs[1::2]:
        run.sort(key=lambda item: (ranks.get(item.path.name, len(ranks)), "deepjit" in item.name))
    items[:] = [item for run in runs for item in run]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that uses a DeepGEMM with every generation.

    A module's ``GENERATIONS`` or a test's own ``parametrize`` mark may name other generations.
    """
    marked = any("deep_gemm" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "deep_gemm" in metafunc.fixturenames and not marked:
        generations = getattr(metafunc.module, "GENERATIONS", ("deepjit", "legacy"))
        metafunc.parametrize("deep_gemm", generations, indirect=True, scope="session")


@pytest.fixture(scope="session")
def deep_gemm(request: pytest.FixtureRequest) -> Path | None:
    """The DeepGEMM of a generation. None stands for the installed one, which is DeepJIT."""
    if request.param == "deepjit":
        named = os.environ.get("CACHEBUILDER_TEST_DEEPJIT")
        return Path(named) if named else None
    assert LEGACY.is_dir(), f"wanted the legacy DeepGEMM in {LEGACY}; make installs it"
    return LEGACY


@pytest.fixture(scope="session")
def build_small(small: Path, shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildSmall:
    """Builds the small manifest with one generation of DeepGEMM.

    The first process compiles; every other process takes the plan and the kernels from the shared cache folder. A test
    that compiles some of these kernels for something else has this build done first, so that it is not done twice.
    """

    @functools.cache
    def build(deep_gemm: Path | None) -> building.Built:
        output = tmp_path_factory.mktemp("built") / "small.tar.zst"
        inputs = load_manifest(small, deep_gemm=deep_gemm)
        # All processes use the record of the first build, because only that build ran compilers.
        first_record = shared_folder / f"{inputs.installation.generation}.build.json"
        with one_at_a_time(shared_folder, f"built-{inputs.installation.generation}"):
            artifact = building.build(inputs, output)
            if not first_record.exists():
                if artifact.compiled.reused:  # a test of something else has compiled these kernels before
                    artifact = building.build(inputs, output, options=CompileOptions(use_store=False))
                shutil.copy(build_record.path_for(output), first_record)
            shutil.copy(first_record, build_record.path_for(output))
            return artifact

    return build


@pytest.fixture(scope="session")
def built(build_small: BuildSmall, deep_gemm: Path | None) -> building.Built:
    """The small manifest, built with one generation of DeepGEMM."""
    return build_small(deep_gemm)


@pytest.fixture
def machine(built: building.Built) -> Machine:
    """The machine that the small artifact was built for: its DeepGEMM, no GPU in sight, no variables."""
    return Machine(built.inputs.installation)


@pytest.fixture
def artifact(built: building.Built, tmp_path: Path) -> Path:
    """A copy of the small artifact, for a test that adds a file beside it or sends it somewhere."""
    path = tmp_path / "small.tar.zst"
    path.write_bytes(built.packed.path.read_bytes())
    return path


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry on loopback, for one module's tests."""
    with registry(tmp_path_factory.mktemp("registry")) as running:
        yield running
