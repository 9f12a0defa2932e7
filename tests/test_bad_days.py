"""What goes wrong between a registry and a machine: each a clear error, and nothing half of anything."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cachebuilder.errors import TransferError
from cachebuilder.ship import locations
from cachebuilder.ship.documents import digest_of
from cachebuilder.ship.pull import Puller
from cachebuilder.ship.retry import Again, Retries, Watcher
from tests.conftest import Run
from tests.registries import Answer, Asked, Middleman, Registry, free_port, registry
from tests.shipping import for_another, into, pull_from, push_to

ONCE = Retries(0)


#: One of the two: what travels is bytes, whichever DeepGEMM made them.
GENERATIONS = ("deepjit",)


@pytest.fixture
def between(there: Registry, artifact: Path) -> Iterator[Middleman]:
    """Somebody between us and a registry with the artifact in ``bad``."""
    push_to(there.host, "bad", artifact)
    with Middleman(there.host) as found:
        yield found


def is_blob(asked: Asked, artifact: Path) -> bool:
    return asked.method == "GET" and asked.path.endswith(digest_of(artifact.read_bytes()))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# Down in the middle


def test_a_connection_that_breaks_again_and_again_is_taken_up_where_it_broke(
    between: Middleman, artifact: Path, tmp_path: Path
) -> None:
    whole, breaks = artifact.read_bytes(), []

    def change(asked: Asked, answer: Answer) -> Answer:
        if is_blob(asked, artifact) and len(breaks) < 2:
            breaks.append(asked)
            return Answer(answer.status, answer.headers, answer.body, cut=len(answer.body) // 3)
        return answer

    between.change = change
    said: list[str] = []
    tries = Retries(2, first_wait=0.01, watcher=Watcher(notice=said.append))
    puller = Puller(locations.parse(f"oci://{between.host}/bad:v1"), tries)
    got = puller.fetch(puller.look_up()[0], into(tmp_path / "got"))
    assert got.read_bytes() == whole and left(tmp_path / "got") == ["small.tar.zst"]
    ranges = [asked.headers.get("Range") for asked in between.asked if is_blob(asked, artifact)]
    first = len(whole) // 3
    assert ranges == [None, f"bytes={first}-", f"bytes={first + (len(whole) - first) // 3}-"]
    assert [line.startswith("retry ") for line in said] == [True, True]


@pytest.mark.slow
def test_what_a_failed_pull_got_the_next_one_does_not_fetch_again(
    between: Middleman, artifact: Path, run: Run, tmp_path: Path
) -> None:
    whole = artifact.read_bytes()
    between.change = lambda asked, answer: (
        Answer(answer.status, answer.headers, answer.body, cut=1000) if is_blob(asked, artifact) else answer
    )
    command = ("pull", f"oci://{between.host}/bad:v1", "-o", tmp_path / "got" / "a.tar.zst")
    done = run(*command, CACHEBUILDER_RETRIES="0")
    assert done.returncode == 15 and "the connection broke" in done.stderr, done.stderr
    assert "hint: run the same command again" in done.stderr
    [part] = left(tmp_path / "got")
    assert part.startswith(".a.tar.zst.") and (tmp_path / "got" / part).stat().st_size == 1000
    between.change = lambda asked, answer: answer
    assert run(*command).returncode == 0
    assert between.asked[-1].headers["Range"] == "bytes=1000-"
    assert (tmp_path / "got" / "a.tar.zst").read_bytes() == whole and left(tmp_path / "got") == ["a.tar.zst"]


def test_a_part_that_was_spoilt_meanwhile_is_fetched_anew(between: Middleman, artifact: Path, tmp_path: Path) -> None:
    between.change = lambda asked, answer: (
        Answer(answer.status, answer.headers, answer.body, cut=1000) if is_blob(asked, artifact) else answer
    )
    location = f"oci://{between.host}/bad:v1"
    with pytest.raises(TransferError, match="the connection broke"):
        pull_from(location, tmp_path / "got")
    [part] = (tmp_path / "got").iterdir()
    part.write_bytes(b"spoilt" * 100)
    between.change = lambda asked, answer: answer
    assert pull_from(location, tmp_path / "got").read_bytes() == artifact.read_bytes()
    assert left(tmp_path / "got") == ["small.tar.zst"]


def test_a_registry_that_takes_no_ranges_is_read_from_the_start(
    between: Middleman, artifact: Path, tmp_path: Path
) -> None:
    whole, count = artifact.read_bytes(), []

    def change(asked: Asked, answer: Answer) -> Answer:
        if not is_blob(asked, artifact):
            return answer
        count.append(asked)
        headers = {n: v for n, v in answer.headers.items() if n not in ("Content-Range", "Accept-Ranges")}
        return Answer(200, headers, whole, cut=500 if len(count) == 1 else None)

    between.change = change
    assert pull_from(f"oci://{between.host}/bad:v1", tmp_path / "got").read_bytes() == whole
    assert len(count) == 2


def test_a_registry_that_comes_back_is_waited_for(artifact: Path, tmp_path: Path) -> None:
    with registry(tmp_path / "registry") as found:
        push_to(found.host, "bad", artifact)
        found.stop()
        starts = threading.Timer(0.5, found.start)
        starts.start()
        puller = Puller(locations.parse(f"oci://{found.host}/bad:v1"), Retries(5, first_wait=0.3))
        assert puller.look_up()
        starts.join()


def test_a_registry_that_is_down_is_one_sentence(artifact: Path, run: Run, tmp_path: Path) -> None:
    host = f"127.0.0.1:{free_port()}"
    for command in (
        ("push", f"oci://{host}/a:b", artifact),
        ("restore", f"oci://{host}/a:b", "--to", tmp_path / "dir"),
    ):
        done = run(*command, CACHEBUILDER_RETRIES="0")
        assert done.returncode == 15 and "Connection refused" in done.stderr and "Traceback" not in done.stderr
        assert "object at 0x" not in done.stderr
    assert not (tmp_path / "dir").exists()


def test_a_push_that_breaks_is_sent_again_whole_and_the_tag_is_never_of_half(
    there: Registry, artifact: Path, tmp_path: Path
) -> None:
    broken: list[str] = []

    def change(asked: Asked, answer: Answer) -> Answer:
        if asked.method == "PATCH" and not broken:
            broken.append(asked.path)
            return Answer(502, {}, b"")
        if asked.method == "GET" and "/blobs/uploads/" in asked.path:
            return Answer(404, {}, b"")  # forgotten, as distribution 2.8 does with a torn upload
        return answer

    with Middleman(there.host, change) as between:
        push_to(between.host, "torn", artifact)
    assert broken and pull_from(f"oci://{there.host}/torn:v1", tmp_path / "got").read_bytes() == artifact.read_bytes()


def test_a_push_goes_on_from_what_the_registry_says_it_has(there: Registry, artifact: Path, tmp_path: Path) -> None:
    """The registry took all of the PATCH, but its answer was lost: nothing is sent twice."""
    patches: list[Asked] = []
    lost: list[Answer] = []

    def change(asked: Asked, answer: Answer) -> Answer:
        if asked.method == "PATCH":
            patches.append(asked)
            if len(patches) == 1:
                lost.append(answer)
                return Answer(503, {"Retry-After": "0"}, b"")
        if asked.method == "GET" and "/blobs/uploads/" in asked.path and lost:
            return Answer(204, lost.pop().headers, b"")  # as a registry that remembers answers
        return answer

    with Middleman(there.host, change) as between:
        push_to(between.host, "lost", artifact)
    sent = {asked.path.split("?")[0] for asked in patches}
    assert len(patches) == len(sent), "an upload was sent again"
    assert pull_from(f"oci://{there.host}/lost:v1", tmp_path / "got").read_bytes() == artifact.read_bytes()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_an_answer_that_may_be_otherwise_in_a_moment_is_asked_for_again(
    status: int, between: Middleman, tmp_path: Path
) -> None:
    refused: list[str] = []

    def change(asked: Asked, answer: Answer) -> Answer:
        if len(refused) < 2:
            refused.append(asked.path)
            return Answer(status, {"Retry-After": "0"}, b"")
        return answer

    between.change = change
    assert pull_from(f"oci://{between.host}/bad:v1", tmp_path / "got").exists()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 418])
def test_an_answer_that_will_stay_is_not_asked_for_again(status: int, between: Middleman, tmp_path: Path) -> None:
    body = b'{"errors":[{"code":"DENIED","message":"no \\u001b[31mway"}]}'
    between.change = lambda asked, answer: Answer(status, {}, body)
    with pytest.raises(TransferError) as caught:
        pull_from(f"oci://{between.host}/bad:v1", tmp_path / "got")
    assert len(between.asked) == 1
    assert "\x1b" not in str(caught.value)


def test_waits_grow_are_bounded_and_follow_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)

    def fail(after: float | None) -> Callable[[], None]:
        def action() -> None:
            raise Again(TransferError("no"), after)

        return action

    with pytest.raises(TransferError):
        Retries(8).run(fail(None))
    assert len(slept) == 8 and all(2 ** (n - 2) <= w <= 2 ** (n - 1) for n, w in enumerate(slept[:6]))
    assert max(slept) <= 30
    slept.clear()
    with pytest.raises(TransferError):
        Retries(1).run(fail(7.0))
    with pytest.raises(TransferError):
        Retries(1).run(fail(86400.0))
    assert slept == [7.0, 30.0]


def test_a_server_that_gives_a_little_each_time_does_not_keep_us_for_ever(
    between: Middleman, artifact: Path, tmp_path: Path
) -> None:
    between.change = lambda asked, answer: (
        Answer(answer.status, answer.headers, answer.body, cut=10) if is_blob(asked, artifact) else answer
    )
    with pytest.raises(TransferError, match="the connection broke"):
        pull_from(f"oci://{between.host}/bad:v1", tmp_path / "got")
    assert len([asked for asked in between.asked if is_blob(asked, artifact)]) == 3


# Redirects


def test_a_redirect_is_followed_and_the_credentials_stay_behind(
    between: Middleman, there: Registry, artifact: Path, run: Run, tmp_path: Path
) -> None:
    with Middleman(there.host) as store:

        def change(asked: Asked, answer: Answer) -> Answer:
            if asked.headers.get("Authorization") is None:
                return Answer(401, {"WWW-Authenticate": 'Basic realm="x"'}, b"")
            if is_blob(asked, artifact):
                return Answer(307, {"Location": f"http://{store.host}{asked.path}?signature=a-secret"}, b"")
            return answer

        between.change = change
        (tmp_path / "docker").mkdir()
        auth = {"auths": {between.host: {"username": "u", "password": "p"}}}
        (tmp_path / "docker" / "config.json").write_text(json.dumps(auth))
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login n password n\n")
        environment = {"DOCKER_CONFIG": str(tmp_path / "docker"), "HOME": str(tmp_path), "CACHEBUILDER_RETRIES": "0"}
        command = ("pull", f"oci://{between.host}/bad:v1", "-o", tmp_path / "got.tar.zst")
        done = run(*command, **environment)
        assert done.returncode == 0, done.stderr
        assert store.asked and all("Authorization" not in asked.headers for asked in store.asked)
        (tmp_path / "got.tar.zst").unlink()
        store.change = lambda asked, answer: Answer(403, {}, b"")
        done = run(*command, **environment)
        assert done.returncode == 15 and f"http://{store.host} answers 403" in done.stderr, done.stderr
        assert "a-secret" not in done.stderr


def test_redirects_in_a_circle_end(between: Middleman, tmp_path: Path) -> None:
    between.change = lambda asked, answer: Answer(302, {"Location": f"http://{between.host}/v2/x"}, b"")
    with pytest.raises(TransferError, match="redirects more than 5 times"):
        pull_from(f"oci://{between.host}/bad:v1", tmp_path / "got")


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[", "//"])
def test_a_redirect_to_anything_but_http_is_refused(target: str, between: Middleman, tmp_path: Path) -> None:
    between.change = lambda asked, answer: Answer(302, {"Location": target}, b"")
    with pytest.raises(TransferError):
        pull_from(f"oci://{between.host}/bad:v1", tmp_path / "got")


# A tag that moves


def test_a_tag_that_moved_since_the_last_pull_does_not_replace_a_file_unasked(
    there: Registry, artifact: Path, run: Run, tmp_path: Path
) -> None:
    location, file = f"oci://{there.host}/moves:latest", tmp_path / "got.tar.zst"
    push_to(there.host, "moves", artifact, tag="latest")
    assert run("pull", location, "-o", file).returncode == 0
    newer = for_another(artifact, "newer", "H200")
    push_to(there.host, "moves", newer, tag="latest")
    done = run("pull", location, "-o", file)
    assert done.returncode == 10 and "found another one" in done.stderr and "--force" in done.stderr, done.stderr
    assert file.read_bytes() == artifact.read_bytes()
    assert run("pull", location, "-o", file, "--force").returncode == 0
    assert file.read_bytes() == newer.read_bytes()


def test_a_tag_that_moves_in_the_middle_of_a_pull_mixes_nothing(
    between: Middleman, there: Registry, artifact: Path, tmp_path: Path
) -> None:
    newer = for_another(artifact, "newer", "H200")

    def change(asked: Asked, answer: Answer) -> Answer:
        if asked.path.endswith("/manifests/v1"):
            push_to(there.host, "bad", newer)
        return answer

    between.change = change
    assert pull_from(f"oci://{between.host}/bad:v1", tmp_path / "got").read_bytes() == artifact.read_bytes()
    assert pull_from(f"oci://{there.host}/bad:v1", tmp_path / "new").read_bytes() == newer.read_bytes()


# Several at once


def test_pulls_into_one_file_at_once_are_all_whole(there: Registry, artifact: Path, tmp_path: Path) -> None:
    push_to(there.host, "bad", artifact)
    failed: list[BaseException] = []

    def pull() -> None:
        try:
            pull_from(f"oci://{there.host}/bad:v1", tmp_path / "got")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=pull) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and left(tmp_path / "got") == ["small.tar.zst"]
    assert (tmp_path / "got" / "small.tar.zst").read_bytes() == artifact.read_bytes()


@pytest.mark.slow
def test_a_hundred_pulls_at_once_are_all_whole(there: Registry, artifact: Path, tmp_path: Path) -> None:
    push_to(there.host, "bad", artifact)
    with ThreadPoolExecutor(100) as pool:
        pulls = [pool.submit(pull_from, f"oci://{there.host}/bad:v1", tmp_path / f"{n}") for n in range(100)]
    assert {pull.result().read_bytes() for pull in pulls} == {artifact.read_bytes()}
    assert len({pull.result() for pull in pulls}) == 100


def test_a_killed_pull_leaves_a_part_and_no_artifact(between: Middleman, artifact: Path, tmp_path: Path) -> None:
    started = threading.Event()

    def change(asked: Asked, answer: Answer) -> Answer:
        if is_blob(asked, artifact):
            started.set()
            threading.Event().wait(5)
        return answer

    between.change = change
    command = [sys.executable, "-m", "cachebuilder", "pull", f"oci://{between.host}/bad:v1", "-o", tmp_path / "g" / "a"]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL)
    assert started.wait(20)
    process.kill()
    process.wait()
    assert all(name.endswith(".part") for name in left(tmp_path / "g"))
