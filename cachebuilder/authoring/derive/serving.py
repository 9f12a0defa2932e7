"""How an engine is run, and the questions that its rules answer about a model: the base of `vllm` and `sglang`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import ClassVar

from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.layers import Call, Experts, LeftOut, Linear
from cachebuilder.authoring.derive.quantization import BLOCK, Checkpoint
from cachebuilder.authoring.derive.switches import Known, Switches
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.errors import ModelError
from cachebuilder.ops.catalog import OpBase


@dataclass(frozen=True)
class IndexerLogits:
    """How an engine calls the logits of sparse attention's indexer.

    Attributes:
        prefill: the function for logits over a batch's own keys, and its fields beside ``heads``.
        paged: the function for decoding over the paged cache, which follows its schedule's kernel; its fields.
        batches: for each number of query rows that a sequence has (two with one speculated token), the most sequences.
        flat: each row is a sequence of its own, whatever the number of rows.
    """

    prefill: tuple[str, Mapping[str, object]]
    paged: tuple[str, Mapping[str, object]]
    batches: Mapping[int, int]
    flat: bool = False

    def calls(self, heads: int, what: str) -> list[Call]:
        """The calls of the layers that ``what`` names."""
        function, fields = self.prefill
        calls = [Call(function, {"heads": heads, **fields}, f"{what}, prefill")]
        sizes: dict[str, dict[str, object]]
        if self.flat:
            most = max(rows * batch for rows, batch in self.batches.items())
            rows_text = f"up to {max(self.batches)} query rows a sequence, each row as a sequence of its own"
            sizes = {rows_text: {"max_batch": most, "varlen": True}}
        else:
            sizes = {
                f"{rows} query row{'s' if rows > 1 else ''} a sequence": {"max_batch": batch, "next_n": rows}
                for rows, batch in self.batches.items()
            }
        function, fields = self.paged
        for rows_text, size in sizes.items():
            where = f"{what}, decoding with {rows_text}"
            calls.append(Call("get_paged_mqa_logits_metadata", size, where))
            calls.append(Call(function, {"heads": heads, **fields, **size}, where))
        return calls


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the engine's own options set.

    Attributes:
        tp, ep, dp, pp: tensor, expert, data and pipeline parallel sizes as the engine's options take them.
        max_tokens, max_seqs: the largest numbers of tokens and of sequences in a step.
        max_model_len: the longest sequence; None: the model's own.
        low_latency: DeepEP's low-latency dispatch brings tokens to the experts.
    """

    tp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1
    max_tokens: int = 8192
    max_seqs: int = 1024
    max_model_len: int | None = None
    low_latency: bool = False


@dataclass(frozen=True)
class Ranks:
    """How many ranks attention's projections, a shared expert, each routed expert and a dense MLP are divided among."""

    attention: int
    shared: int
    expert: int
    dense: int


@dataclass(frozen=True, kw_only=True)
class Serving(EngineOptions):
    """An engine's rules for one deployment.

    Attributes:
        version: the engine's release, which the rules cover (see `release`).
        moe_deep_gemm: the routed experts run in DeepGEMM (engines have other kernels for them as well).
        mega_moe: they run in its mega-MoE: dispatch, both GEMMs and combine in one kernel.
        switches: what further options of the engine set.
    """

    gpu: Gpu
    version: str
    moe_deep_gemm: bool = True
    mega_moe: bool = False
    switches: Switches = field(default_factory=Switches)

    name: ClassVar[str]
    #: Releases whose source was read, oldest first. A release between two of them takes the older one's rules, and its
    #: manifest says so.
    versions: ClassVar[tuple[str, ...]]
    #: Sentences about the engine for the head of the manifest.
    header: ClassVar[tuple[str, ...]]
    #: Its further options and variables that bear on shapes.
    known: ClassVar[Known]

    @classmethod
    def release(cls, version: str | None) -> str:
        """``version``, or for None the newest release that was read.

        ``0.25`` stands for any release of 0.25.

        Raises:
            ModelError: ``version`` is no release, is older than any that was read, or newer than the newest one's
                series.
        """
        if version is None:
            return cls.versions[-1]
        key, oldest, newest = (version_key(text) for text in (version, cls.versions[0], cls.versions[-1]))
        wanted = f"from {cls.versions[0]} on" if len(key) < 2 or key < oldest[: len(key)] else ""
        if key[:2] > newest[:2]:
            wanted = f"up to {newest[0]}.{newest[1]}"
        if wanted:
            raise ModelError(
                f"--engine-version: wanted a release of {cls.name} {wanted}, found {version}",
                hint=f"the rules were read in {', '.join(cls.versions)}; name one of these to take its rules",
            )
        return version

    @property
    def read_version(self) -> str:
        """The release whose rules hold: the newest that was read and is not newer than this one's series."""
        key = version_key(self.version)
        older = [read for read in self.versions if version_key(read)[: len(key)] <= key]
        return older[-1] if older else self.versions[0]

    def at_least(self, version: str) -> bool:
        """Whether this release has the rules of ``version`` or of a later one."""
        return version_key(self.read_version) >= version_key(version)

    @property
    def unknown(self) -> tuple[str, ...]:
        """For the manifest: that this release was not read."""
        if version_key(self.version)[:2] == version_key(self.read_version)[:2]:
            return ()
        return (
            f"{self.name} {self.version} was not read: these are the rules of {self.read_version}, the next older "
            "release that was",
        )

    def check(self, config: Config) -> None:
        """Raise ModelError where the engine would not run this way, or would not use DeepGEMM for this model."""
        if self.gpu.major not in (9, 10, 12):
            raise ModelError(f"wanted a Hopper or Blackwell GPU, found {self.gpu.name} ({self.gpu.capability})")

    def check_class(self, config: Config, since: Mapping[str, str]) -> None:
        """Raise ModelError where this engine's release lacks the model's class, or no rule reads how it runs it.

        Args:
            since: engine → the first of the read releases that has the class; empty: all do.
        """
        if not since:
            return
        if (first := since.get(self.name)) is None:
            raise ModelError(
                f"{config.path}: no rule here reads {config.architecture} as {self.name} runs it: wanted "
                f"{' or '.join(since)}",
                hint="observe the engine (cachebuilder observe), or record it (cachebuilder record)",
            )
        if not self.at_least(first):
            raise ModelError(
                f"{config.path}: wanted {self.name} {first} or later, which has {config.architecture}, found "
                f"{self.version}"
            )

    @property
    def ranks(self) -> Ranks:
        """How many ranks share each kind of layer."""
        raise NotImplementedError

    @property
    def modelopt(self) -> tuple[str, ...]:
        """ModelOpt's ``quant_algo`` with which block-FP8 weights reach DeepGEMM."""
        raise NotImplementedError

    @property
    def sm_counts(self) -> tuple[int, ...]:
        """The SM counts that the engine sets around all of its calls; empty: it leaves them at the GPU's."""
        return ()

    @property
    def largest_m(self) -> int:
        """The largest M of a dense GEMM."""
        raise NotImplementedError

    def prefix_tokens(self, config: Config, sparse: bool) -> int | None:
        """The largest M of ``kv_b_proj``; None where it is not also called for context that is already in the cache.

        Args:
            sparse: the layer has an indexer.
        """
        return None

    def fuses_shared_experts(self, config: Config, shared: int) -> bool:
        """Whether the engine runs the shared expert as one more routed expert."""
        return False

    def keeps_unquantized(self, checkpoint: Checkpoint, weight: str, module: str) -> bool:
        """Whether the checkpoint's list of unquantised modules covers ``weight``, as this engine reads the list.

        Args:
            weight: the name in the checkpoint.
            module: the engine's name of the layer, which may fuse several weights.
        """
        raise NotImplementedError

    def skips_block_check(self, checkpoint: Checkpoint, linear: Linear, rows: Sequence[int]) -> bool:
        """Whether the engine loads this layer although a division falls within a block.

        Args:
            rows: those of each of the layer's weights on one rank.
        """
        return False

    def padded_rows(self, checkpoint: Checkpoint, n: int) -> int:
        """The rows of a linear layer's weight on one rank as its GEMM gets them."""
        return n

    def padded_width(self, experts: Experts, width: int) -> int:
        """The width of an expert's part on one rank as its GEMMs get it."""
        return width

    def expert_ops(self, experts: Experts, count: int, n: int, k: int) -> list[tuple[OpBase, str]]:
        """Ops of the GEMM of expert weights [count, n, k] on one rank, each with the arithmetic of its M."""
        raise NotImplementedError

    def fuses_into_mega_moe(self, shared: int) -> bool:
        """Whether the mega-MoE kernel also runs the shared experts."""
        return False

    def mega_moe_calls(self, experts: Experts, shared: int = 0, hashed: tuple[int, ...] = ()) -> list[Call]:
        """The calls of a mega-MoE layer, and of the DeepGEMM functions that this engine calls around it.

        Args:
            shared: how many shared experts a layer has.
            hashed: layers in which a token's hash chooses the experts.

        Raises:
            ModelError: the engine does not run these experts this way.
        """
        raise NotImplementedError

    def grouped_output_at_load(self, name: str, groups: int, rows: int, k: int) -> list[Call]:
        """The calls at load that bring the scales of V4's grouped output [groups, rows, k] into DeepGEMM's layout.

        vLLM 0.33.0 ``deepgemm_post_process_fp8_weight_block`` with ``is_bmm`` (layers/quantization/utils/fp8_utils.py),
        SGLang 0.5.23 ``_setup_fp8_wo_a_scales`` (srt/models/deepseek_v4.py). On SM90 the scales stay as they are.
        """
        if self.gpu.major == 9:
            return []
        fields = {"k": k, "recipe": [BLOCK, BLOCK], "groups": groups, "rows": rows}
        return [Call("transform_sf_into_required_layout", fields, f"scales of {name} at load")]

    def projects_indexer_keys(self, config: Config) -> bool:
        """Whether V3.2's indexer projects its keys in a linear layer of its own."""
        return False

    def indexer_beside(self) -> tuple[int, int] | None:
        """Up to how many tokens V3.2's indexer also projects queries beside other work, and the SM count then."""
        return None

    def indexer_logits(self, v4: bool) -> IndexerLogits:
        """How the engine calls the logits of sparse attention's indexer: DeepSeek V4's, or V3.2's."""
        raise NotImplementedError

    @property
    def moe_rule(self) -> str:
        """For the manifest: when the engine runs routed experts in DeepGEMM; empty where it always does."""
        return ""

    def left_out(self, config: Config) -> list[LeftOut]:
        """What the engine asks of DeepGEMM for this model and no op of the manifest covers."""
        return []


def version_key(version: str) -> tuple[int, ...]:
    """A release as numbers, to compare: 0.25.0 → (0, 25, 0). Drops everything from the first part that is no number."""
    return tuple(map(int, takewhile(str.isdigit, version.split("."))))
