"""The visible GPU, with a library in NVML's place that answers as NVIDIA's does: the machines of CI have no driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.common import native
from tests.conftest import Run

#: The functions that pynvml calls, with the types of nvml.h of CUDA 13.0. Handles 1 and 2 are cards, the second an H20;
#: 3 is a MIG instance of the first.
LIBRARY = r"""
#include <stdlib.h>
#include <string.h>
static int number(const char *name) { const char *text = getenv(name); return text ? atoi(text) : 0; }
int nvmlInitWithFlags(unsigned flags) { return number("TEST_INIT"); }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(index + 1L); return index > 1; }
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
    strncpy(uuid, device == (void *)1 ? "GPU-aa11" : "GPU-bb22", length);
    return 0;
}
int nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *next) {
    *now = *next = device == (void *)1 && number("TEST_INSTANCE_SMS");
    return 0;
}
int nvmlDeviceGetMigDeviceHandleByIndex(void *card, unsigned index, void **device) {
    *device = (void *)3;
    return number("TEST_INSTANCE_SMS") < 0 || card != (void *)1 || index;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { *device = (void *)3; return !!strcmp(uuid, "MIG-cc33"); }
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *instance, void **device) {
    *device = (void *)1;
    return instance != (void *)3;
}
int nvmlDeviceGetAttributes_v2(void *device, unsigned *attributes) {
    memset(attributes, 0, 40);
    attributes[0] = number("TEST_INSTANCE_SMS");
    return device != (void *)3;
}
int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    strncpy(name, device == (void *)1 ? getenv("TEST_NAME") : "NVIDIA H20", length);
    return device > (void *)2;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    *major = number("TEST_CAPABILITY") / 10;
    *minor = number("TEST_CAPABILITY") % 10;
    return device > (void *)2;
}
int nvmlSystemGetDriverVersion(char *version, unsigned length) { strncpy(version, "580.1", length); return 0; }
int nvmlDeviceGetNumGpuCores(void *device, unsigned *cores) {
    *cores = 128 * (device == (void *)1 ? number("TEST_SMS") : 78);
    return device > (void *)2 || !*cores;
}
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(LIBRARY)
    command = [*native.find_c_compiler(), "-shared", "-fPIC", "-o", "libnvidia-ml.so.1", "nvml.c"]
    subprocess.run(command, cwd=folder, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
@pytest.mark.parametrize(
    ("card", "words"),
    [
        pytest.param({"NAME": "NVIDIA H200", "CAPABILITY": "90", "SMS": "132"}, [], id="the-card-itself"),
        pytest.param({"NAME": "NVIDIA H200", "CAPABILITY": "90", "SMS": "0"}, [], id="sm-count-unknown"),
        pytest.param({"NAME": "NVIDIA H20", "CAPABILITY": "90", "SMS": "78", "INIT": "9"}, [], id="no-driver-loaded"),
        pytest.param(
            {"NAME": "NVIDIA H20", "CAPABILITY": "90", "SMS": "78"},
            ["sm_counts", "wanted: [132]", "found:  78 (NVIDIA H20)", "add it to target.sm_counts"],
            id="fewer-sms",
        ),
        pytest.param(
            {"NAME": "NVIDIA B200", "CAPABILITY": "100", "SMS": "148"},
            ["arch", "wanted: sm_90a", "found:  sm_100 (NVIDIA B200)", "build for the GPU that serves"],
            id="another-architecture",
        ),
    ],
)
def test_a_restore_compares_the_gpu_that_is_visible(
    card: dict[str, str], words: list[str], library: Path, built: building.Built, run: Run, tmp_path: Path
) -> None:
    here = ("--deep-gemm", built.inputs.installation.imported_as)
    environment = {"LD_LIBRARY_PATH": str(library)} | {f"TEST_{name}": value for name, value in card.items()}
    done = run("restore", built.packed.path, "--to", tmp_path / "dir", *here, **environment)
    assert done.returncode == (9 if words else 0), done.stderr
    for word in words:
        assert word in done.stderr
    assert (tmp_path / "dir").exists() != bool(words)
    if words:
        forced = run("restore", built.packed.path, "--to", tmp_path / "dir", "--force", *here, **environment)
        assert forced.returncode == 0 and "forced" in forced.stderr and words[2] in forced.stderr
        looked = run("doctor", tmp_path / "dir", *here, **environment)
        assert f"GPU          {card['NAME']}, compute capability" in looked.stdout and words[2] in looked.stdout
        started = run("run", tmp_path / "dir", *here, "--", "echo", "started", **environment)
        assert (started.returncode, started.stdout) == (9, ""), "every call would miss here"
        for word in words:
            assert word in started.stderr
        forced = run("run", tmp_path / "dir", "--force", *here, "--", "echo", "started", **environment)
        assert (forced.returncode, forced.stdout) == (0, "started\n")
        proved = run("verify", tmp_path / "dir", *here, **environment)
        assert proved.returncode == 0 and "0 missing" in proved.stdout, "verify replays for the manifest's GPU"
        assert words[2] in proved.stdout, "and says that another one is here"


#: CUDA_VISIBLE_DEVICES, the SMs of the first card's MIG instance (0: MIG is off, -1: it has no instance), and the GPU
#: that CUDA would take.
VISIBLE = [
    pytest.param(None, 0, "NVIDIA H200, 132 SMs", id="not-set"),
    pytest.param("0,1", 0, "NVIDIA H200, 132 SMs", id="first"),
    pytest.param("1,0", 0, "NVIDIA H20, 78 SMs", id="second-card-first"),
    pytest.param("GPU-bb22", 0, "NVIDIA H20, 78 SMs", id="by-uuid"),
    pytest.param("GPU-b", 0, "NVIDIA H20, 78 SMs", id="by-the-beginning-of-a-uuid"),
    pytest.param("GPU-zz", 0, "none", id="unknown-uuid"),
    pytest.param("2", 0, "none", id="no-such-card"),
    pytest.param("", 0, "none", id="empty"),
    pytest.param("-1", 0, "none", id="minus-one"),
    pytest.param(None, 60, "NVIDIA H200, 60 SMs", id="mig-instance"),
    pytest.param("1", 60, "NVIDIA H20, 78 SMs", id="the-card-beside-one-in-mig-mode"),
    pytest.param("MIG-cc33", 16, "NVIDIA H200, 16 SMs", id="mig-instance-by-uuid"),
    pytest.param("MIG-none", 16, "none", id="unknown-mig-instance"),
    pytest.param(None, -1, "none", id="mig-without-an-instance"),
]
FIRST_GPU = """
from cachebuilder.cuda import nvml
gpu = nvml.first_gpu()
print(f"{gpu.name}, {gpu.sm_count} SMs" if gpu else "none")
"""


@pytest.mark.parametrize(("visible", "instance_sms", "expected"), VISIBLE)
def test_the_first_gpu_is_the_one_that_cuda_would_take(
    visible: str | None, instance_sms: int, expected: str, library: Path
) -> None:
    card = {"NAME": "NVIDIA H200", "CAPABILITY": "90", "SMS": "132", "INSTANCE_SMS": str(instance_sms)}
    assert first_gpu(library, card, visible) == expected


def test_a_machine_without_the_library_or_without_a_driver_has_no_gpu(library: Path, tmp_path: Path) -> None:
    assert first_gpu(library, {"INIT": "9"}) == "none"  # NVML_ERROR_DRIVER_NOT_LOADED
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"no library")
    assert first_gpu(tmp_path, {}) == "none"


def first_gpu(library: Path, card: dict[str, str], visible: str | None = None) -> str:
    """The first GPU in a process that finds this ``library`` first."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(library)} | {f"TEST_{name}": v for name, v in card.items()}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command = [sys.executable, "-c", FIRST_GPU]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
