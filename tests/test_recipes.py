"""The block-FP8 checkpoints of two books of recipes, held against the engines' runs."""

from __future__ import annotations

import json

from benchmarks.engines import recipes

LINES = tuple(recipes.judged())


def test_no_manifest_of_one_lacks_or_has_more_than_the_engine_asked_for() -> None:
    bad = ("surplus", "refused wrongly", "incomplete")
    assert [line for line in LINES if line.verdict in bad] == []


def test_what_was_not_judged_is_read_or_refused_with_a_reason() -> None:
    assert all(line.why for line in LINES if line.verdict != "exact")


def test_a_run_that_asked_for_another_shape_is_not_exact() -> None:
    config = json.loads(recipes.RECIPES.read_text())["models"]["Qwen/Qwen3-32B-FP8"]["config"]
    shapes = sorted(recipes.rules_shapes(config, "vllm 0.25.0", "tp1"), key=str)
    words = {
        "exact": {"shapes": shapes, "lack": 0},
        "incomplete": {"shapes": [*shapes, ("fp8_gemm_nt", None, 64, 128)], "lack": 0},
        "surplus": {"shapes": shapes[1:], "lack": 0},
        "not judged": None,
    }
    assert {recipes.verdict(config, "vllm 0.25.0", "tp1", run)[0] for run in words.values()} == set(words)
    lacking = recipes.verdict(config, "vllm 0.25.0", "tp1", {"shapes": shapes, "lack": 3})
    assert lacking == ("incomplete", "3 kernels of the run are missing")
