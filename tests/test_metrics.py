"""What a monitor asks: the misses as Prometheus reads them, and the exit code of a probe."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import kubernetes_validate
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from cachebuilder.cli.main import cli
from cachebuilder.errors import ArtifactError, InstallationError, VerifyError
from cachebuilder.restoring import frozen, miss_log
from tests.conftest import ROOT, Run
from tests.test_frozen import DIGEST, KERNEL
from tests.users import STRANGER, as_user, ground, needs_root, owned

__all__ = ["ground"]

NOW = int(time.time())
EXAMPLES = ROOT / "examples" / "prometheus"
PROMTOOL = shutil.which("promtool")
Samples = dict[tuple[str, ...], float]


@pytest.fixture
def dir(tmp_path: Path) -> Path:
    """A folder that looks like a restored one to the frozen nvcc."""
    frozen.write(tmp_path / "dir" / frozen.FOLDER, "nvcc\n", "small", DIGEST)
    (tmp_path / "kernel.cu").write_text(KERNEL)
    return tmp_path / "dir"


def miss(dir: Path, **variables: str) -> None:
    """A miss, as the frozen nvcc writes it."""
    subprocess.run([frozen.frozen_nvcc(dir), dir.parent / "kernel.cu"], env=os.environ | variables, capture_output=True)


def line(kernel: object = "a", seconds: object = NOW, **more: object) -> str:
    return json.dumps({"time": seconds, "kernel": kernel, "policy": "refuse", "artifact": "small"} | more) + "\n"


def samples(text: str) -> Samples:
    """Every sample by its name and the values of its labels, as Prometheus's own parser reads them."""
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def metrics(run: Run, log: Path, **variables: str) -> Samples:
    done = run("misses", log, "--format", "prometheus", **variables)
    assert done.returncode == 0, done.stderr
    return samples(done.stdout)


def test_misses_are_counters_by_kernel_artifact_and_policy(dir: Path, run: Run) -> None:
    miss(dir)
    miss(dir)
    miss(dir, CACHEBUILDER_ON_MISS="compile", CACHEBUILDER_REAL_NVCC="/bin/true")
    found = metrics(run, dir / "cachebuilder" / "misses.jsonl")
    by_kernel = {labels: value for labels, value in found.items() if labels[0] == "cachebuilder_kernel_misses_total"}
    assert by_kernel == {
        ("cachebuilder_kernel_misses_total", "small", "sm90_fp8_gemm_1d2d", "refuse"): 2,
        ("cachebuilder_kernel_misses_total", "small", "sm90_fp8_gemm_1d2d", "compile"): 1,
    }
    assert found["cachebuilder_misses_total",] == 3
    assert NOW <= found["cachebuilder_last_miss_timestamp_seconds",] <= time.time()
    assert NOW <= found["cachebuilder_misses_read_timestamp_seconds",] <= time.time()


def test_before_the_first_miss_the_metrics_are_there_and_0(dir: Path, run: Run) -> None:
    """``increase()`` needs a value to increase from. The log is made by the first miss."""
    found = metrics(run, dir / "cachebuilder" / "misses.jsonl")
    found.pop(("cachebuilder_misses_read_timestamp_seconds",))
    assert found == {
        ("cachebuilder_misses_total",): 0,
        ("cachebuilder_miss_log_unreadable_lines_total",): 0,
        ("cachebuilder_last_miss_timestamp_seconds",): 0,
        ("cachebuilder_miss_logs",): 0,
    }


@pytest.mark.parametrize("option", ["--probe", "--format=prometheus"])
def test_a_log_in_a_folder_that_is_not_there_is_no_log_without_a_miss(option: str, run: Run, tmp_path: Path) -> None:
    """A misspelt path or a volume that is not mounted must not read as "no miss"."""
    done = run("misses", tmp_path / "none" / "misses.jsonl", option)
    assert (done.returncode, done.stdout) == (ArtifactError.exit_code, "")
    assert "wanted a log, or at least its folder, found neither: no miss could be logged there" in done.stderr
    assert run("misses", tmp_path, option).returncode == ArtifactError.exit_code  # a folder, and no restored one


@needs_root
@pytest.mark.parametrize("option", ["--probe", "--format=prometheus"])
def test_a_log_that_this_user_cannot_see_is_no_log_without_a_miss(option: str, ground: Path, run: Run) -> None:
    log = owned(ground / "private", mode=0o700) / "log"
    log.write_text(line())

    def look() -> None:
        with pytest.raises(ArtifactError, match="cannot be read: Permission denied"):
            miss_log.tally(miss_log.logs(log, {}))

    as_user(STRANGER + 1, look)


def test_a_hostile_log_breaks_no_line_and_makes_no_more_than_1001_series(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "log"
    odd = ['a"} 1\nevil_total 7', "\\", "a" * 300, "\x1b[2J", "ü", "", None, 5, ["a"], "# HELP x"]
    lines = [line(kernel, artifact=kernel, policy=kernel) for kernel in odd]
    lines += [line(f"k{number}", artifact=f"a{number}") for number in range(3000)]
    lines += [line(seconds=value) for value in (10**18, -(10**18), 10**4000, 1e99, True, "1", None, NOW + 3600)]
    lines += ["[]\n", '{"kernel"\n', "[" * 100_000 + "\n", "\n"]
    log.write_text("".join(lines).replace(str(NOW), "5"))
    found = metrics(run, log)
    assert not any("evil" in name for name, *_ in found)
    by_kernel = {
        labels: value for (name, *labels), value in found.items() if "kernel" in name for labels in [tuple(labels)]
    }
    assert by_kernel["unknown", "unknown", "unknown"] == len(odd)
    assert len(by_kernel) == 1001 and by_kernel["other", "other", "other"] == 3000 - 999 + 8
    assert found["cachebuilder_misses_total",] == sum(by_kernel.values())
    assert found["cachebuilder_miss_log_unreadable_lines_total",] == 4  # the longest one is two
    assert found["cachebuilder_last_miss_timestamp_seconds",] == 5


def test_a_file_is_replaced_in_one_step_with_a_mode_that_the_collector_can_read(dir: Path, run: Run) -> None:
    file = dir.parent / "textfile" / "cachebuilder.prom"
    file.parent.mkdir()
    file.write_text("old")
    before = file.stat().st_ino
    os.umask(os.umask(0o077))
    done = run("misses", dir, "--format", "prometheus", "-o", file)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert samples(file.read_text())["cachebuilder_misses_total",] == 0
    assert file.stat().st_ino != before and file.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in file.parent.iterdir()] == ["cachebuilder.prom"]


def test_a_folder_stands_for_every_log_that_its_frozen_nvcc_writes(dir: Path, run: Run) -> None:
    """A read-only image logs in TMPDIR, and a probe that looked at DIR alone would see nothing."""
    temporary, own = dir.parent / "tmp", dir.parent / "own.jsonl"
    temporary.mkdir()
    variables = {"TMPDIR": str(temporary), "CACHEBUILDER_MISS_LOG": str(own)}
    assert run("misses", dir, "--probe", **variables).returncode == 0
    miss(dir, TMPDIR=str(temporary), CACHEBUILDER_MISS_LOG="/nonexistent/log")
    assert (temporary / f"cachebuilder-misses-{os.geteuid()}" / "misses.jsonl").exists()
    done = run("misses", dir, "--probe", **variables)
    assert done.returncode == VerifyError.exit_code, done.stderr
    miss(dir, **variables)
    miss(dir)
    found = metrics(run, dir, **variables)
    assert (found["cachebuilder_miss_logs",], found["cachebuilder_misses_total",]) == (3, 3)
    assert "requests: 3" in run("misses", dir, **variables).stdout


@needs_root
def test_a_private_log_that_another_user_planted_fails_no_probe(dir: Path, run: Run) -> None:
    private = owned(dir.parent / f"cachebuilder-misses-{os.geteuid()}", STRANGER, 0o777)
    (private / "misses.jsonl").write_text(line())
    assert run("misses", dir, "--probe", TMPDIR=str(dir.parent)).returncode == 0


def test_a_probe_is_silent_until_the_first_miss_and_then_exits_with_11_and_the_kernel(dir: Path, run: Run) -> None:
    done = run("misses", dir, "--probe")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    miss(dir)
    done = run("misses", dir, "--probe")
    assert (done.returncode, done.stdout) == (VerifyError.exit_code, "")
    assert done.stderr == (
        f"error: {dir}: wanted no miss, found 1: sm90_fp8_gemm_1d2d\n"
        f"hint: cachebuilder misses {dir} shows what to add to the manifest\n"
    )
    assert run("misses", dir).returncode == 0  # a person who only looks


def test_a_probe_sees_the_line_that_a_full_disk_cut_short(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(line()[:20])
    done = run("misses", log, "--probe")
    assert done.returncode == VerifyError.exit_code
    assert "found 1 that the frozen nvcc did not write or not finish" in done.stderr


def test_a_probe_leaves_out_what_is_older_than_since(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(line(seconds=int(time.time()) - 1800))
    assert run("misses", log, "--probe", "--since", "10m").returncode == 0
    assert run("misses", log, "--probe", "--since", "1h").returncode == VerifyError.exit_code
    log.write_text(line(seconds=None))  # a miss without a time is one that may be new
    assert run("misses", log, "--probe", "--since", "10m").returncode == VerifyError.exit_code


@needs_root
def test_a_probe_works_for_any_user_without_a_home_on_a_read_only_file_system(ground: Path) -> None:
    """As Kubernetes runs it: a number without a passwd entry, and nothing that can be written."""
    frozen.write(ground / "dir" / frozen.FOLDER, "nvcc\n", "small", DIGEST)
    command = [shutil.which("unshare") or pytest.skip("wants unshare(1)"), "--mount", "sh", "-ec"]
    script = (
        "for place in /tmp /var/tmp /dev/shm /; do mount -o bind $place $place; mount -o remount,ro,bind $place; done\n"
        "if touch /x /tmp/x 2>/dev/null; then exit 99; fi\n"
        "cd /\n"
        'exec "$@"'
    )
    python = (
        "import os, sys, cachebuilder.cli.main, cachebuilder.cli.misses\n"
        "os.setgroups([]); os.setgid(12345); os.setuid(12345)  # after the imports, since this Python may be root's\n"
        "sys.argv = ['cachebuilder', 'misses', os.environ['DIR'], '--probe']\n"
        "try: cachebuilder.cli.main.main()\n"
        "finally:\n"
        "    heavy = {'torch', 'pydantic', 'yaml', 'rich', 'cryptography'} & set(sys.modules)\n"
        "    assert not heavy, heavy"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "DIR": f"{ground}/dir"}
    done = subprocess.run(
        [*command, script, "sh", sys.executable, "-c", python], env=environment, capture_output=True, text=True
    )
    assert done.returncode == ArtifactError.exit_code  # the server may log anywhere
    assert "cannot be written by user 12345, so the log may be in a place that run chose" in done.stderr
    assert "set CACHEBUILDER_MISS_LOG, for the server and here, or name the log" in done.stderr
    environment["CACHEBUILDER_MISS_LOG"] = f"{ground}/log"
    for expected in (0, VerifyError.exit_code):
        done = subprocess.run(
            [*command, script, "sh", sys.executable, "-c", python], env=environment, capture_output=True, text=True
        )
        assert done.returncode == expected, done.stderr
        (ground / "log").write_text(line())


def test_two_servers_of_one_collector_differ_by_a_label(dir: Path, run: Run) -> None:
    """The textfile collector refuses the same metric with the same labels in two files."""
    miss(dir)
    done = run("misses", dir, "--format", "prometheus", "--label", 'pod=a"\\\n', "--label", "gpu=H200")
    found = samples(done.stdout)
    assert found["cachebuilder_misses_total", "H200", 'a"\\\n'] == 1
    assert all({"H200", 'a"\\\n'} <= set(labels) for labels in found)


@pytest.mark.skipif(PROMTOOL is None, reason="wants promtool (Debian's package prometheus)")
def test_promtool_takes_the_rules_their_tests_and_the_metrics(dir: Path, run: Run) -> None:
    miss(dir)
    text = run("misses", dir, "--format", "prometheus", "--label", "pod=a").stdout
    for arguments, given in (
        (["check", "rules", "rules.yaml"], None),
        (["test", "rules", "rules_test.yaml"], None),
        (["check", "metrics"], text),
    ):
        done = subprocess.run([str(PROMTOOL), *arguments], cwd=EXAMPLES, input=given, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


def test_every_metric_of_the_rules_is_one_that_is_there_without_a_miss(dir: Path, run: Run) -> None:
    text = run("misses", dir, "--format", "prometheus").stdout
    rules = YAML(typ="safe").load((EXAMPLES / "rules.yaml").read_text())["groups"][0]["rules"]
    named = {name for rule in rules for name in re.findall(r"cachebuilder_\w+", rule["expr"])}
    assert named == {name for name in re.findall(r"^\w+", text, re.MULTILINE) if name in named} and len(named) == 3


def test_kubernetes_takes_the_pod_and_its_commands_are_cachebuilders() -> None:
    pod = YAML(typ="safe").load((EXAMPLES / "pod.yaml").read_text())
    kubernetes_validate.validate(pod, "1.35", strict=True)
    [sidecar], [server] = pod["spec"]["initContainers"], pod["spec"]["containers"]
    mounts = {mount["name"] for container in (sidecar, server) for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}
    texts = [sidecar["args"][0], server["args"][0], server["startupProbe"]["exec"]["command"][2]]
    texts.append((EXAMPLES / "cachebuilder-misses.service").read_text())
    found = [re.search(r"cachebuilder ((?:misses|run) .*?)(?: -- .*)?$", t.replace("\\\n", ""), re.M) for t in texts]
    for verb, *arguments in (shlex.split(match[1]) for match in found if match):
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        command.make_parser(click.Context(command)).parse_args(arguments)
    assert all(found)


@pytest.mark.parametrize(
    "options",
    [
        ["--probe", "--json"],
        ["--probe", "--format", "prometheus"],
        ["--probe", "--add-to", "m.yaml"],
        ["--probe", "-o", "file"],
        ["--since", "10m"],
        ["--probe", "--since", "10"],
        ["--json", "--format", "prometheus"],
        ["--label", "a=b"],
        ["--format", "prometheus", "--label", "a-b=c"],
        ["--format", "prometheus", "--label", "__a=b"],
        ["--format", "prometheus", "--label", "kernel=b"],
        ["--format", "prometheus", "--label", "a"],
        ["--format", "prometheus", "--add-to", "m.yaml"],
        ["-o", "file"],
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together_are_one_sentence(options: list[str], run: Run, tmp_path: Path) -> None:
    done = run("misses", tmp_path / "log", *options)
    assert done.returncode == 2 and "wanted " in done.stderr
    assert not (Path.cwd() / "file").exists()


def test_json_is_the_same_by_either_option_and_in_a_file(dir: Path, run: Run) -> None:
    miss(dir)
    printed = run("misses", dir, "--json").stdout
    assert printed == run("misses", dir, "--format", "json").stdout
    run("misses", dir, "--json", "-o", dir.parent / "file")
    assert json.loads((dir.parent / "file").read_text()) == json.loads(printed)


def test_without_prometheus_client_the_error_names_the_extra(dir: Path) -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None; from cachebuilder.cli.main import main\n"
        "sys.argv = ['cachebuilder', 'misses', sys.argv[1], '--format', 'prometheus']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, dir], capture_output=True, text=True)
    assert done.returncode == InstallationError.exit_code
    assert "pip install 'cachebuilder[metrics]'" in done.stderr
