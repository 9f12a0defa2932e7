"""How an engine is run, and what its rules say about a model: the base of `vllm` and `sglang`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from cachebuilder.authoring.derive.config import BLOCK, Config
from cachebuilder.authoring.derive.layers import Call, Experts, LeftOut
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.errors import ModelError
from cachebuilder.ops.catalog import OPS, OpBase


@dataclass(frozen=True)
class Serving:
    """One deployment.

    Attributes:
        version: the engine's release; one of the engine's `versions`.
        tp, ep, dp, pp: tensor, expert, data and pipeline parallel sizes as the engine's own options take them.
        max_tokens: the largest number of tokens in a step.
        max_seqs: the largest number of sequences in a step.
        max_model_len: the longest sequence; None: the model's own.
        low_latency: experts through DeepEP's low-latency dispatch.
        moe_deep_gemm: the routed experts are DeepGEMM's (an engine has other kernels for them, too).
        mega_moe: they are its mega-MoE's: dispatch, both GEMMs and combine in one kernel.
    """

    gpu: Gpu
    version: str
    tp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1
    max_tokens: int = 8192
    max_seqs: int = 1024
    max_model_len: int | None = None
    low_latency: bool = False
    moe_deep_gemm: bool = True
    mega_moe: bool = False

    name: ClassVar[str]
    #: Releases whose source was read, oldest first; rules of a release between two are those of the older one.
    versions: ClassVar[tuple[str, ...]]

    @classmethod
    def release(cls, version: str | None) -> str:
        """``version`` if the rules reach back to it, else the newest release that was read.

        Raises:
            ModelError: no release, or one older than any that was read.
        """
        if version is None:
            return cls.versions[-1]
        if len(version_key(version)) < 2 or version_key(version) < version_key(cls.versions[0]):
            raise ModelError(
                f"--engine-version: wanted a release of {cls.name} from {cls.versions[0]} on, found {version}",
                hint=f"the source of {', '.join(cls.versions)} was read; a release between takes the older one's rules",
            )
        return version

    def at_least(self, version: str) -> bool:
        """Whether this release is ``version`` or a later one."""
        return version_key(self.version) >= version_key(version)

    def check(self, config: Config) -> None:
        """Raise ModelError where the engine would not run this way, or not use DeepGEMM for this model at all."""
        if self.gpu.major not in (9, 10, 12):
            raise ModelError(f"wanted a Hopper or Blackwell GPU, found {self.gpu.name} ({self.gpu.capability})")

    @property
    def attention_ranks(self) -> int:
        """Ranks that attention's projections are divided among."""
        raise NotImplementedError

    @property
    def shared_ranks(self) -> int:
        """Ranks that a shared expert is divided among."""
        raise NotImplementedError

    @property
    def expert_ranks(self) -> int:
        """Ranks that each routed expert is divided among."""
        raise NotImplementedError

    @property
    def largest_m(self) -> int:
        """The largest M of a dense GEMM."""
        raise NotImplementedError

    def prefix_tokens(self, config: Config) -> int | None:
        """The largest M of ``kv_b_proj`` where it is also called for the context that is in the cache already."""
        return None

    def fuses_shared_experts(self, config: Config, shared: int) -> bool:
        """Whether the shared expert is one more routed expert."""
        return False

    def keeps_unquantized(self, config: Config, module: str) -> bool:
        """Whether the checkpoint's list of unconverted modules covers ``module``, as this engine reads the list."""
        raise NotImplementedError

    def expert_ops(self, experts: Experts, count: int, n: int, k: int) -> list[tuple[OpBase, str]]:
        """Ops of one expert GEMM of weight [count, n, k] on a rank, each with the arithmetic of its M."""
        raise NotImplementedError

    def fuses_into_mega_moe(self, shared: int) -> bool:
        """Whether mega-MoE's kernel runs the shared experts, too."""
        return False

    def mega_moe_calls(self, experts: Experts, shared: int = 0, hashed: tuple[int, ...] = ()) -> list[Call]:
        """The calls of a mega-MoE layer: what DeepGEMM does besides it for this engine, and the layer's.

        Args:
            shared: shared experts.
            hashed: layers whose experts a token's hash gives.

        Raises:
            ModelError: the engine does not run these experts this way.
        """
        raise NotImplementedError

    def grouped_output_at_load(self, name: str, groups: int, rows: int, k: int) -> list[Call]:
        """The calls that bring the scales of V4's grouped output [groups, rows, k] into DeepGEMM's layout.

        vLLM 0.33.0 ``deepgemm_post_process_fp8_weight_block`` with ``is_bmm`` (layers/quantization/utils/fp8_utils.py),
        SGLang 0.5.23 ``_setup_fp8_wo_a_scales`` (srt/models/deepseek_v4.py). On SM90 the scales stay as they are.
        """
        if self.gpu.major == 9:
            return []
        fields = {"k": k, "recipe": [BLOCK, BLOCK], "groups": groups, "rows": rows}
        return [Call("transform_sf_into_required_layout", fields, f"scales of {name} at load")]

    def projects_indexer_keys(self, config: Config) -> bool:
        """Whether V3.2's indexer has a linear layer of its own for its keys."""
        return False

    def indexer_beside(self) -> tuple[int, int] | None:
        """Tokens up to which V3.2's indexer also projects queries beside other work, and the SM count then."""
        return None

    def indexer_calls(self, heads: int, what: str, v4: bool) -> list[Call]:
        """The calls that sparse attention's indexer makes besides its projections: V4's, or V3.2's."""
        return []

    def header(self, config: Config) -> list[str]:
        """Sentences about the engine for the head of the manifest."""
        raise NotImplementedError

    @property
    def moe_rule(self) -> str:
        """When the engine's routed experts are DeepGEMM's, for the manifest; empty where they always are."""
        return ""

    def left_out(self, config: Config, has_experts: bool) -> list[LeftOut]:
        """What the engine does with the model that no op of the manifest covers."""
        return []


def knows(op: str, *fields: str) -> bool:
    """Whether a manifest can name ``op`` with these fields."""
    return op in OPS and set(fields) <= OPS[op].model_fields.keys()


def indexer_calls(
    prefill: str,
    paged: str,
    heads: int,
    formats: Mapping[str, object],
    batches: Mapping[int, int],
    what: str,
    flat: bool = False,
) -> list[Call]:
    """Logits over a batch's own keys, and for decoding over the paged cache after its schedule's kernel.

    Args:
        batches: for each number of query rows that a sequence has (two with one speculated token), the most sequences.
        flat: each row is a sequence, however many there are.
    """
    calls = [Call(prefill, {"heads": heads, **formats}, f"{what}, prefill")]
    shared = {name: value for name, value in formats.items() if name != "compressed"}
    if flat:
        most = max(rows * batch for rows, batch in batches.items())
        what_rows = f"up to {max(batches)} query rows a sequence, each by itself"
        sizes = [({"max_batch": most, "varlen": True}, what_rows)]
    else:
        sizes = [
            ({"max_batch": batch, "next_n": rows}, f"{rows} query row{'s' if rows > 1 else ''} a sequence")
            for rows, batch in batches.items()
        ]
    for size, rows in sizes:
        where = f"{what}, decoding with {rows}"
        calls += [
            Call("get_paged_mqa_logits_metadata", size, where),
            Call(paged, {"heads": heads, **shared, **size}, where),
        ]
    return calls


def version_key(version: str) -> tuple[int, ...]:
    """A release as numbers, for comparing: 0.25.0 → (0, 25, 0); what follows a non-number is dropped."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
