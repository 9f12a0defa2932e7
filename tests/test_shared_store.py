"""A store that builders share: a folder, or a bucket that moto's server speaks S3 for."""

from __future__ import annotations

import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.compiling.store import shared_name
from cachebuilder.errors import StoreError, TransferError
from cachebuilder.planning.kept import KeptPlans, plan_key
from cachebuilder.ship.objects import Objects
from cachebuilder.ship.retry import Patience, Retries, Watcher
from cachebuilder.ship.shared import SharedStore, open_store
from tests.conftest import Run
from tests.registries import free_port
from tests.test_stores import s3
from tests.users import STRANGER, as_user, ground, needs_root, owned

__all__ = ["ground", "s3"]

#: One generation is enough: a store treats the results of both alike.
GENERATIONS = ("deepjit",)

NAME = "kernels/ab/abcd"


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store's URL: a folder that is not there yet, or a folder of a bucket."""
    if request.param == "folder":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('s3')}{tmp_path.name}"


def store(url: str, builder: str = "one", *, read_only: bool = False, notices: list[str] | None = None) -> SharedStore:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHEBUILDER_BUILDER", builder)
        heard = notices if notices is not None else []
        return SharedStore(url, Retries(0, watcher=Watcher(notice=heard.append)), read_only=read_only)


def overwrite(url: str, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change an object behind the store's back."""
    objects = Objects(url, url, Retries(0))
    path = f"{objects.path}/{name}"
    objects.ask("pipe_file", path, change(objects.read([path])[path]))


def test_what_one_builder_puts_another_gets(url: str) -> None:
    assert store(url).get([NAME]) == {}
    assert store(url).absent([NAME]) == [NAME]
    store(url, "one").put(NAME, b"cubin")
    two = store(url, "two")
    assert two.get([NAME, "kernels/ab/none"]) == {NAME: b"cubin"}
    assert two.absent([NAME]) == [] and two.names("kernels") == {NAME} and two.names("plans") == set()


def test_the_same_result_twice_is_no_alarm_and_the_first_one_stays(url: str) -> None:
    store(url, "one").put(NAME, b"cubin")
    before = Objects(url, url, Retries(0)).read([path_of(url)])
    store(url, "two").put(NAME, b"cubin")
    assert Objects(url, url, Retries(0)).read([path_of(url)]) == before


def path_of(url: str) -> str:
    return f"{Objects(url, url, Retries(0)).path}/{NAME}"


def test_another_result_under_the_same_key_names_both_builders(url: str) -> None:
    store(url, "node-7").put(NAME, b"cubin")
    with pytest.raises(StoreError, match=r"kernels/ab/abcd.*node-7.*sha256.*node-9 now"):
        store(url, "node-9").put(NAME, b"another")
    assert store(url).get([NAME]) == {NAME: b"cubin"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param(lambda data: data[:-1], "wanted sha256", id="truncated"),
        pytest.param(lambda data: data[:-1] + b"?", "wanted sha256", id="one byte changed"),
        pytest.param(lambda data: b"", "without one", id="empty"),
        pytest.param(lambda data: b"cubin", "without one", id="no header"),
        pytest.param(lambda data: b"{}\n" + data, "its header", id="another header"),
        pytest.param(lambda data: b"x" * 10_000, "without one", id="no line"),
        pytest.param(lambda data: data.replace(b"abcd", b"abce", 1), "found kernels/ab/abce", id="another's object"),
    ],
)
def test_a_damaged_object_is_said_and_made_again(change: Callable[[bytes], bytes], why: str, tmp_path: Path) -> None:
    url, notices = str(tmp_path / "store"), list[str]()
    store(url).put(NAME, b"cubin")
    overwrite(url, NAME, change)
    repairing = store(url, "two", notices=notices)
    assert repairing.get([NAME]) == {}
    assert len(notices) == 1 and NAME in notices[0] and why in notices[0]
    repairing.put(NAME, b"cubin")
    assert store(url).get([NAME]) == {NAME: b"cubin"}


def test_a_damaged_object_that_nobody_read_before_is_replaced_by_a_result(url: str) -> None:
    store(url).put(NAME, b"cubin")
    overwrite(url, NAME, lambda data: data[:-2])
    store(url, "two").put(NAME, b"cubin")
    assert store(url).get([NAME]) == {NAME: b"cubin"}


def test_a_store_that_is_only_read_is_not_changed(url: str) -> None:
    store(url).put(NAME, b"cubin")
    reader = store(url, read_only=True)
    reader.put("kernels/ab/more", b"cubin")
    reader.replace("records/r", b"{}")
    assert reader.get([NAME]) == {NAME: b"cubin"} and reader.absent(["kernels/ab/more"]) == []
    assert reader.names("kernels") == {NAME} and reader.names("records") == set()


def test_a_reader_takes_a_folder_that_is_not_there_for_empty_and_makes_none(tmp_path: Path) -> None:
    reader = store(str(tmp_path / "store"), read_only=True)
    assert reader.get([NAME]) == {} and reader.names("kernels") == set() and not (tmp_path / "store").exists()


def test_a_folder_is_made_but_not_the_one_above_it(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="No such file") as caught:
        open_store(str(tmp_path / "not-mounted" / "store"))
    assert "mounted" in str(caught.value.hint) and not (tmp_path / "not-mounted").exists()


def test_a_writer_that_dies_leaves_no_object_and_no_name(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    code = (
        "import os, sys; from cachebuilder.ship import shared; from cachebuilder.ship.retry import Retries\n"
        "os.link = lambda *_: os._exit(9)\n"
        f"shared.SharedStore({url!r}, Retries(0)).put({NAME!r}, b'cubin')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert store(url).get([NAME]) == {} and store(url).names("kernels") == set()
    store(url).put(NAME, b"cubin")
    assert store(url).names("kernels") == {NAME}


@needs_root
def test_a_store_that_this_user_may_not_write_is_one_sentence(ground: Path) -> None:
    folder = owned(ground / "store", 0, 0o755)
    as_user(STRANGER, lambda: _refusal(str(folder)))


def _refusal(url: str) -> None:
    with pytest.raises(TransferError, match="Permission denied") as caught:
        store(url).put(NAME, b"cubin")
    assert "--read-only" in str(caught.value.hint)


@needs_root
def test_a_full_store_is_one_sentence_and_holds_no_part_of_an_object(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "none", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("wants to mount a small tmpfs, which this machine does not allow")
    try:
        full = store(str(disk / "store"))
        with pytest.raises(TransferError, match="No space left") as caught:
            full.put(NAME, b"x" * 100_000)
        assert caught.value.hint == "make room there"
        assert full.names("kernels") == set() and not any(path.is_file() for path in disk.rglob("*"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_store_that_is_down_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    _name_server(monkeypatch, free_port())
    with pytest.raises(TransferError, match=r"s3://caches/down.*(connect|Connect)") as caught:
        store("s3://caches/down").get([NAME])
    assert "again" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("status", "words"), [(403, "Forbidden|AccessDenied|PermissionError"), (503, "503|SlowDown|reduce|busy|Error")]
)
def test_a_store_that_refuses_is_one_sentence(status: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with _server(status) as port:
        _name_server(monkeypatch, port)
        with pytest.raises(TransferError, match=words):
            store("s3://caches/refusing").put(NAME, b"cubin")


def test_a_store_that_does_not_answer_ends_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with _server(None) as port:
        _name_server(monkeypatch, port)
        silent = SharedStore("s3://caches/silent", Retries(0, patience=Patience(0.5, 1 << 30)))
        with pytest.raises(TransferError, match=r"Timeout|timed out"):
            silent.get([NAME])


def _name_server(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "fleet", "AWS_SECRET_ACCESS_KEY": "swordfish",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()  # one of another server is kept otherwise


@contextmanager
def _server(status: int | None) -> Iterator[int]:
    """A server that answers each request with this status; None: it never answers."""
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # botocore waits for 100 Continue before it sends a body

        def do_PUT(self) -> None:
            if status is None:
                released.wait(60)
                return
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST = do_PUT

        def log_message(self, *_: object) -> None:
            pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            released.set()
            server.shutdown()


# A build with a store


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes this process another machine's: an empty cache folder of this name, and the builder's name."""

    def become(name: str) -> None:
        monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(tmp_path / name))
        monkeypatch.setenv("CACHEBUILDER_BUILDER", name)

    yield become


@pytest.mark.slow
def test_a_second_builder_neither_plans_nor_compiles_and_packs_equal_bytes(
    built: building.Built, tmp_path: Path, own_cache: Callable[[str], None]
) -> None:
    shared = open_store(str(tmp_path / "store"))
    first = building.build(
        built.inputs, tmp_path / "first.tar.zst", options=CompileOptions(shared=shared)
    )  # kept: all is
    assert not first.compiled.compiled
    own_cache("second")
    watched: list[str] = []
    second = building.build(
        built.inputs, tmp_path / "second.tar.zst", options=CompileOptions(shared=shared),
        progress=lambda step, *_, **__: watched.append(step),
    )  # fmt: skip
    assert second.compiled.reused == len(built.plan.kernels) and "plan" not in watched
    assert second.packed.sha256 == first.packed.sha256 == built.packed.sha256


@pytest.mark.slow
def test_a_poisoned_kernel_is_not_packed(
    built: building.Built, tmp_path: Path, own_cache: Callable[[str], None], run: Run, small: Path
) -> None:
    url = str(tmp_path / "store")
    shared = open_store(url)
    building.build(built.inputs, tmp_path / "first.tar.zst", options=CompileOptions(shared=shared))
    victim = sorted(shared.names("kernels"))[0]
    overwrite(url, victim, lambda data: data[:-100] + b"\0" * 100)
    done = run(
        "build", small, "--store", url, "-o", tmp_path / "a.tar.zst", CACHEBUILDER_CACHE_DIR=str(tmp_path / "second")
    )
    assert done.returncode == 0, done.stderr
    assert victim in done.stderr and "damaged" in done.stderr and "compiled  1 kernel" in done.stdout
    assert built.packed.sha256 in done.stdout


@pytest.mark.slow
def test_a_pull_request_reads_the_store_and_leaves_it_as_it_was(
    built: building.Built, tmp_path: Path, run: Run, small: Path
) -> None:
    url = str(tmp_path / "store")
    KeptPlans(own=False, shared=open_store(url)).put(plan_key(built.inputs), built.plan)
    before = sorted(path for path in Path(url).rglob("*"))
    done = run("build", small, "--store", url, "--read-only", "-o", tmp_path / "a.tar.zst")
    assert done.returncode == 0 and built.packed.sha256 in done.stdout, done.stderr
    assert sorted(path for path in Path(url).rglob("*")) == before


def test_read_only_without_a_store_is_a_wrong_command_line(run: Run, small: Path) -> None:
    done = run("plan", small, "--read-only")
    assert done.returncode == 2 and "--store URL" in done.stderr


def test_an_object_says_who_made_it_and_when(tmp_path: Path) -> None:
    store(str(tmp_path / "store"), "node-7").put(shared_name("abcd"), b"cubin")
    header = json.loads((tmp_path / "store/kernels/ab/abcd").read_bytes().partition(b"\n")[0])
    assert header["builder"] == "node-7" and header["written"].endswith("+00:00")
    assert os.stat(tmp_path / "store/kernels/ab/abcd").st_mode & 0o777 == 0o644
