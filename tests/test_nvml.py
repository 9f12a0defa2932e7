"""The visible GPU, asked of a library that answers as NVIDIA's does: the machines of CI have no driver."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cachebuilder import build as building
from cachebuilder import native
from tests.conftest import Run

#: The functions that are asked, with the types of nvml.h of CUDA 13.0.
LIBRARY = r"""
#include <stdlib.h>
#include <string.h>
static int number(const char *name) { const char *text = getenv(name); return text ? atoi(text) : 0; }
int nvmlInit_v2(void) { return number("TEST_INIT"); }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)1; return index; }
int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    strncpy(name, getenv("TEST_NAME"), length);
    return device != (void *)1;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    *major = number("TEST_CAPABILITY") / 10;
    *minor = number("TEST_CAPABILITY") % 10;
    return device != (void *)1;
}
int nvmlSystemGetDriverVersion(char *version, unsigned length) { strncpy(version, "580.1", length); return 0; }
int nvmlDeviceGetNumGpuCores(void *device, unsigned *cores) {
    *cores = 128 * number("TEST_SMS");
    return device != (void *)1 || !*cores;
}
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(LIBRARY)
    command = [*native.find_c_compiler(), "-shared", "-fPIC", "-o", "libnvidia-ml.so.1", "nvml.c"]
    subprocess.run(command, cwd=folder, check=True)
    return folder


@pytest.mark.parametrize(
    ("card", "words"),
    [
        pytest.param({"NAME": "NVIDIA H200", "CAPABILITY": "90", "SMS": "132"}, [], id="the-card-itself"),
        pytest.param({"NAME": "NVIDIA H200", "CAPABILITY": "90", "SMS": "0"}, [], id="sm-count-not-told"),
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
