"""What a kernel is, and the table of GPUs."""

import json
import re
import shutil
from pathlib import Path

import pytest

from cachebuilder.building import Built
from cachebuilder.cuda.gpus import GPUS
from cachebuilder.errors import ArtifactError
from cachebuilder.inspecting import explain as explaining
from cachebuilder.inspecting.explain import Explanation, explain
from tests.conftest import Run
from tests.restored import unpack


def test_a_kernel_of_an_artifact_is_explained_with_the_op_that_asks_for_it(built: Built, run: Run) -> None:
    kernel = next(kernel for kernel in built.plan.kernels if "grouped" in kernel.name)
    done = run("explain", kernel.entry[-32:][:12], "--in", built.packed.path)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert kernel.name in text and "asked by small: m_grouped_fp8_gemm_nt_contiguous experts=2" in text
    assert "pipeline stages in shared memory" in text and re.search(r"\d+ registers", text)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_kernels_folder_and_its_key_are_explained_alike(built: Built, tmp_path: Path, run: Run) -> None:
    folder = unpack(built.packed.path, tmp_path / "to")
    for entry in sorted(path for path in (folder / "cache").iterdir() if path.is_dir())[:3]:
        from_folder, by_key = explain(str(entry)), explain(entry.name, folder)
        assert from_folder == by_key and from_folder.asked_by
        done = run("explain", entry, "--json")
        assert Explanation.model_validate_json(done.stdout) == from_folder


def test_no_op_asks_for_a_kernel_that_deepgemm_compiled_itself(built: Built, tmp_path: Path) -> None:
    folder = unpack(built.packed.path, tmp_path / "to")
    entry = next(path for path in (folder / "cache").iterdir() if "grouped" in path.name)
    alone = Path(shutil.copytree(entry, tmp_path / "own" / "cache" / entry.name))
    explanation = explain(str(alone))
    assert explanation.asked_by == () and explanation.resources is not None
    assert explanation.made_for is not None and explanation.made_for.op == "m_grouped_fp8_gemm_nt_contiguous"


@pytest.mark.parametrize("key", ["zz", "abc", "", "../..", "0" * 32])
def test_a_text_that_is_no_key_is_refused_in_one_sentence(built: Built, key: str) -> None:
    with pytest.raises(ArtifactError, match="wanted a kernel's folder, its name or the first digits"):
        explain(key, built.packed.path)


def test_digits_that_two_kernels_share_are_refused() -> None:
    entries = ["a.1234" + "0" * 28, "b.1234" + "1" * 28]
    with pytest.raises(ArtifactError, match="wanted one kernel, 2 begin so"):
        explaining._entry_called("1234", entries, "here")
    assert explaining._entry_called("12341", entries, "here") == entries[1]


def test_gpus_are_the_table_a_manifest_can_name(run: Run) -> None:
    done = run("gpus")
    assert all(re.search(rf"^{name} ", done.stdout, re.MULTILINE) for name in GPUS)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert [gpu["name"] for gpu in json.loads(run("gpus", "--json").stdout)] == list(GPUS)
