from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest

from cachebuilder.authoring import sources
from cachebuilder.cuda import gpus
from cachebuilder.errors import ManifestError
from cachebuilder.manifest import schema as manifest
from tests.archives import compress, edit_index, join, replace, unpack
from tests.conftest import MANIFESTS, ROOT, Run

HEAD = "name: x\ntarget: {gpu: H200}\nmax_tokens: 64\n"
OP = "{op: fp8_gemm_nt, n: 576, k: 512}"


def refusal(text: str) -> str:
    """The message of the error that a manifest raises."""
    with pytest.raises(ManifestError) as error:
        manifest.parse(text.encode(), "m.yaml")
    return str(error.value)


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_manifests_are_valid_and_named_after_their_file(path: Path) -> None:
    model, data = manifest.load(path)
    assert model.name == path.stem
    assert data == path.read_bytes()


def test_max_tokens_is_the_manifests_unless_an_op_has_its_own() -> None:
    model = manifest.parse(f"{HEAD}ops: [{OP}, {{op: bf16_gemm_nt, n: 8, k: 64, max_tokens: 3}}]".encode())
    assert [op.max_tokens for op in model.ops] == [64, 3]


def test_an_ops_own_sm_counts_replace_the_targets() -> None:
    model = manifest.parse(f"{HEAD}ops: [{OP}, {OP.replace('k:', 'sm_counts: [130, 64], k:')}]".encode())
    assert [model.sm_counts_of(op) for op in model.ops] == [[132], [64, 130]]
    assert model.all_sm_counts == [64, 130, 132]


def test_an_op_without_sm_counts_of_its_own_is_written_without_that_field() -> None:
    model = manifest.parse(f"{HEAD}ops: [{OP}, {OP.replace('k:', 'sm_counts: [64], k:')}]".encode())
    assert ["sm_counts" in op.model_dump() for op in model.ops] == [False, True]
    assert "sm_counts" not in model.ops[0].model_dump_json()


def test_explicit_gpu_fields_are_taken() -> None:
    gpu = "{name: mine, capability: '9.0', sm_count: 100, l2_bytes: 52428800, shared_memory_bytes: 232448, clock_khz: 1500000}"
    model = manifest.parse(f"name: x\ntarget: {{gpu: {gpu}}}\nmax_tokens: 1\nops: [{OP}]".encode())
    assert (model.target.gpu.name, model.target.all_sm_counts) == ("mine", [100])


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        pytest.param(f"{HEAD}ops:\n- {OP.replace('k:', 'kk:')}", 5, "unknown field; did you mean k?", id="typo-in-field"),
        pytest.param(f"{HEAD}max_token: 1\nops: [{OP}]", 4, "did you mean max_tokens?", id="typo-at-top"),
        pytest.param(f"{HEAD}ops:\n- {OP.replace('gemm', 'gem')}", 5, "did you mean fp8_gemm_nt?", id="typo-in-op"),
        pytest.param(f"{HEAD}ops: [{{n: 8, k: 16}}]", 4, "ops[0].op: missing; wanted one of", id="no-op"),
        pytest.param(f"{HEAD}ops:\n- {OP}\n- {OP.replace('512', '520')}", 6, "ops[1].k: wanted a multiple of 16", id="k"),
        pytest.param(f"{HEAD}ops:\n- {OP.replace('576', '577')}", 5, "wanted a multiple of 8, found 577", id="n"),
        pytest.param(f"{HEAD}ops:\n- {OP.replace('576', '0')}", 5, "greater than or equal to 8, found 0", id="zero"),
        pytest.param(f"{HEAD}ops:\n- {OP.replace('576', chr(34) + '576' + chr(34))}", 5, "wanted integer, found '576'", id="text"),
        pytest.param(f"{HEAD}ops: [{OP.replace('576', 'true')}]", 4, "wanted integer, found True", id="bool"),
        pytest.param(f"{HEAD}ops: []", 1, "wanted ops, or sources; found neither", id="no-ops"),
        pytest.param(f"name: x\ntarget: {{gpu: H200}}\nops:\n- {OP}", 4, "ops[0]: max_tokens: missing", id="no-maximum"),
        pytest.param(f"{HEAD}ops:\n- {OP}\n- {OP}", 6, "the same shape as ops[0]", id="duplicate-op"),
        pytest.param(HEAD.replace("H200", "GH2O0") + f"ops: [{OP}]", 2, "did you mean GH200?", id="gpu"),
        pytest.param(HEAD.replace("H200}", "H200, sm_counts: [133]}") + f"ops: [{OP}]", 2, "up to H200's 132", id="sms"),
        pytest.param(HEAD.replace("H200}", "H200, sm_counts: [9, 9]}") + f"ops: [{OP}]", 2, "each SM count once", id="sms-twice"),
        pytest.param(f"{HEAD}ops:\n- {OP.replace('k:', 'sm_counts: [133], k:')}", 5, "ops[0]: sm_counts: wanted SM counts up to H200's 132", id="op-sms"),
        pytest.param(f"{HEAD}ops:\n- {OP.replace('k:', 'sm_counts: [9, 9], k:')}", 5, "each SM count once", id="op-sms-twice"),
        pytest.param(f"{HEAD}ops:\n- {OP.replace('k:', 'sm_counts: [0], k:')}", 5, "ops[0].sm_counts[0]: wanted", id="op-no-sms"),
        pytest.param(f"{HEAD}ops:\n- {OP}\n- {OP.replace('k:', 'sm_counts: [9, 132], k:')}", 6, "the same shape as ops[0]", id="op-sms-of-the-target"),
        pytest.param(HEAD.replace("name: x", "name: ../x") + f"ops: [{OP}]", 1, "name: wanted", id="name-is-a-path"),
        pytest.param(f"{HEAD}environment: {{PATH: x}}\nops: [{OP}]", 4, "DeepGEMM reads", id="foreign-variable"),
        pytest.param(f"{HEAD}environment: {{DG_JIT_CACHE_DIR: x}}\nops: [{OP}]", 4, "cachebuilder sets DG_JIT_CACHE_DIR itself", id="our-variable"),
        pytest.param(f"{HEAD}toolchain: {{nvcc: 13}}\nops: [{OP}]", 4, "wanted string, found 13", id="release-as-number"),
        pytest.param("name: x\nname: y\n", 2, "duplicate key", id="duplicate-key"),
        pytest.param("name: [", 1, "not YAML", id="not-yaml"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_with_file_line_and_what_was_wanted(text: str, line: int, words: str) -> None:
    message = refusal(text)
    assert words in message
    assert f"m.yaml:{line}: " in message


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefghij")
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        pytest.param(BOMB, 1, "wanted no anchors and no aliases, found 'a'", id="alias-bomb"),
        pytest.param("name: *a", 1, "wanted no anchors and no aliases", id="alias"),
        pytest.param("name: x\ntarget: !!python/object:os.system {}", 2, "wanted no tags", id="tag"),
        pytest.param("<<: {name: x}", 1, "wanted a text or a number, found '<<'", id="merge-key"),
        pytest.param("? [a]\n: b", 1, "wanted a name as key", id="list-as-key"),
        pytest.param("[" * 1_000_000, 1, "wanted at most 16 levels", id="brackets"),
        pytest.param("- " * 1_000_000, 1, "wanted at most 16 levels", id="dashes"),
        pytest.param("? " * 1_000_000, 1, "wanted at most 16 levels", id="question-marks"),
        pytest.param(f"{HEAD}ops:\n" + f"- {OP}\n" * 60_000, 4684, "wanted at most 32768 values", id="ops"),
        pytest.param("\n" * 4_000_000, 131072, "wanted at most 131072 lines", id="lines"),
        pytest.param("name: " + "x " * 1_000_000, 1, "wanted at most 524288 words", id="words"),
        pytest.param("#" * (4 << 20) + "#", 1, "wanted at most 4194304 bytes", id="bytes"),
        pytest.param("name: " + "1" * 10_000, 1, "not YAML: Exceeds the limit", id="digits"),
    ],
)
def test_a_yaml_bomb_is_refused_before_it_is_unfolded(text: str, line: int, words: str) -> None:
    assert refusal(text).startswith(f"m.yaml:{line}: {words}")


def test_a_yaml_bomb_inside_an_artifact_is_refused_by_verify(run: Run, tmp_path: Path) -> None:
    members = unpack(ROOT / "tests" / "data" / "v1-deepjit.tar.zst")
    digest = hashlib.sha256(BOMB.encode()).hexdigest()
    forged = edit_index(replace(members, 1, BOMB.encode()), lambda index: index.update(manifest=digest))
    path = tmp_path / "bomb.tar.zst"
    path.write_bytes(compress(join(forged)))
    done = run("verify", path)
    assert done.returncode == ManifestError.exit_code and "wanted no anchors" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_manifest_of_four_thousand_sources_is_read() -> None:
    page = "".join(f"      static int line_{number};\n" for number in range(25))
    sources = "".join(f"  - kernel: k{number}\n    source: |\n      // {number}\n{page}" for number in range(4000))
    model = manifest.parse(f"{HEAD}sources:\n{sources}".encode())
    assert len(model.sources) == 4000


SOURCE = "#include <deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh>\nstatic void f() {}\n"


@pytest.mark.parametrize(
    "line",
    [
        '#include "/etc/shadow"',
        "#include </etc/shadow>",
        "#include <deep_gemm/../../../../etc/shadow>",
        "#include <../x>",
        '  # include "x"',
        "#include_next <x>",
        "#import <x>",
        "#embed </etc/shadow>",
        '#line 1 "/etc/shadow"',
        '# 1 "/etc/shadow"',
        '#pragma GCC dependency "/etc/shadow"',
        '#if __has_include("/etc/shadow")',
        "#define X </etc/shadow>",
        "#include X",
        '/**/ #include "/etc/shadow"',
        '/*\n// */ #include "/etc/shadow"',
        '%:include "/etc/shadow"',
        '??=include "/etc/shadow"',
        "#\\\ninclude <x>",
        '// \\ \n',
        "// \r#include </etc/shadow>",
        "\f#include </etc/shadow>",
        'asm(".incbin \\"/etc/shadow\\"");',
        'asm volatile("\\x23include");',
        '__asm__("");',
        '_Pragma("x")',
        "\0",
        "\x1b[2J",
    ],
)  # fmt: skip
def test_a_source_that_includes_a_private_file_is_refused(line: str, tmp_path: Path) -> None:
    text = json.dumps({"name": "x", "target": {"gpu": "H200"}, "sources": [{"source": f"{SOURCE}{line}\n"}]})
    assert re.search(r"m\.yaml:1: sources\[0\]\.source: line [345]: wanted ", refusal(text))
    path = tmp_path / "m.yaml"
    path.write_text(json.dumps({"name": "x", "target": {"gpu": "H200"}, "sources": [{"source": SOURCE}]}))
    before = path.read_bytes()
    with pytest.raises(ManifestError, match="wanted "):
        sources.add(path, [sources.NewSource(f"{SOURCE}{line}\n", "comment")])
    assert path.read_bytes() == before


def test_a_private_file_is_not_printed_by_build(run: Run, tmp_path: Path) -> None:
    secret, path = tmp_path / "secret", tmp_path / "m.yaml"
    secret.write_text("the secret line\n")
    source = f'#include "{secret}"\n{SOURCE}'
    path.write_text(
        json.dumps({"name": "x", "target": {"gpu": "H200"}, "sources": [{"source": source, "kernel": "k"}]})
    )
    done = run("build", path, "-o", tmp_path / "a.tar.zst")
    assert done.returncode == ManifestError.exit_code and "the secret line" not in done.stdout + done.stderr


@pytest.mark.parametrize("text", ["", "- 1", "1", "&a [*a]", "\x00", "a: !!python/object:os.system {}"])
def test_a_file_that_is_no_manifest_is_refused_by_name(text: str) -> None:
    assert refusal(text).startswith("m.yaml")


def test_every_wrong_value_is_listed() -> None:
    message = refusal(f"name: ../x\ntarget: {{gpu: H2OO}}\nops:\n- {OP.replace('576', '577')}")
    assert len(message.splitlines()) == 3


def test_a_missing_manifest_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read: No such file"):
        manifest.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["h100", "NVIDIA H200", "rtx_pro_6000", "gb10"])
def test_gpu_names_are_forgiving(name: str) -> None:
    assert gpus.find(name).name in gpus.GPUS
