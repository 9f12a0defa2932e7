"""Files that are folders, FIFOs or endless, and texts that are no UTF-8: an error each, no traceback and no waiting."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cachebuilder.authoring import recording
from cachebuilder.authoring.derive.config import Config
from cachebuilder.compiling import record
from cachebuilder.errors import CacheBuilderError, RecordingError
from cachebuilder.inspecting.explain import explain
from cachebuilder.inspecting.report import facts
from cachebuilder.inspecting.summary import summarise
from cachebuilder.manifest import schema
from cachebuilder.restoring import misses
from cachebuilder.verifying import report
from tests.conftest import ROOT
from tests.odd import make_odd

READERS: dict[str, Callable[[Path], object]] = {
    "manifest": schema.load,
    "artifact": summarise,
    "plan or artifact": facts.gather,
    "artifact of a kernel": lambda path: explain("x", path),
    "miss log": misses.read,
    "model's config": Config.read,
}


@pytest.fixture(params=["folder", "fifo", "link to /dev/zero", "loop"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "odd"
    make_odd(request.param, path)
    return path


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_never_ends_is_an_error_of_every_reader(reader: str, odd: Path) -> None:
    with pytest.raises(CacheBuilderError):
        READERS[reader](odd)


def test_a_report_or_a_record_that_never_ends_is_none(odd: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "a.tar.zst"
    shutil.copy(ROOT / "tests" / "data" / "v1-deepjit.tar.zst", artifact)
    odd.rename(report.path_for(artifact))
    assert report.read(report.path_for(artifact), "0" * 64) is None
    summary = summarise(artifact)
    dangling = report.path_for(artifact).is_symlink() and not report.path_for(artifact).exists()
    assert dangling if summary.verdict is None else "cannot be read" in summary.verdict.text
    report.path_for(artifact).rename(record.path_for(artifact))
    assert record.read(artifact, summary.sha256) is None


@pytest.mark.parametrize("data", [b"\xff\xfe", b"// \xc3\n", b"x" * ((1 << 16) + 1)])
def test_a_recorded_source_that_is_no_utf8_or_too_long_is_an_error(data: bytes, tmp_path: Path) -> None:
    entry = tmp_path / ("sm90_x." + "0" * 32)
    entry.mkdir()
    for name in ("kernel.cubin", "meta.json", ".committed"):
        (entry / name).touch()
    (entry / "kernel.cu").write_bytes(data)
    with pytest.raises(RecordingError, match=r"wanted UTF-8 text|wanted at most"):
        recording._read_cache(tmp_path)
