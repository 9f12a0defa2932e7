"""Call DeepGEMM at the points of one part of a sweep after another, and join the parts' results.

A part is a range of an op's points at one SM count. What is joined does not depend on how the points were divided, nor
on which process called DeepGEMM at them.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.common.records import Record
from cachebuilder.ops.device import Device
from cachebuilder.sweep import protocol
from cachebuilder.sweep.loading import JobError, classify, text
from cachebuilder.sweep.protocol import Failure, OpSweep, Position, Refusal, Span, SweepJob

#: A part has this many points or more, unless its op has fewer: each part prepares its op anew.
_SMALLEST_PART = 512
#: So many parts for each process: the last of them ends soon after all others.
_PARTS_FOR_EACH = 4
#: More points than any op has.
_ALL = 1 << 40


@dataclass(frozen=True)
class Part:
    """Points of one op at one SM count.

    Attributes:
        op: the op's place in the job.
        first, last: places in the range of the op's points, ``last`` excluded.
    """

    op: int
    sm_count: int
    first: int
    last: int

    @property
    def unit(self) -> tuple[int, int]:
        """What it is a part of: an op at an SM count."""
        return self.sm_count, self.op

    def __len__(self) -> int:
        return self.last - self.first


class PartResult(Record):
    """What was seen in one part.

    Attributes:
        part: its place among all parts.
        calls: how often DeepGEMM was called.
        failure: why the last call failed; the others after it were not made.
        value: the value of the op's variable at which it failed.
        unanswered: names of CUDA calls that the virtual GPU did not answer.
    """

    part: int
    spans: tuple[Span, ...]
    calls: int
    failure: Failure | None = None
    value: int = 0
    unanswered: tuple[str, ...] = ()


class LaunchLog:
    """The virtual GPU's log: which cubins were launched since the last look. Empty on a real GPU, which keeps none."""

    def __init__(self, library: ctypes.CDLL | None) -> None:
        self._library = library
        if library is None:
            return
        self._count = ctypes.c_uint32.in_dll(library, "virtual_gpu_launch_count")
        self._numbers = (ctypes.c_uint32 * 4096).in_dll(library, "virtual_gpu_launches")
        self._path = library.virtual_gpu_library_path
        self._path.restype = ctypes.c_char_p
        self._unanswered = (ctypes.c_char * 4096).in_dll(library, "virtual_gpu_unanswered")

    def take(self) -> tuple[int, ...]:
        """Numbers of the cubins launched since the last call, in order. Raises RuntimeError if some were not noted."""
        if self._library is None:
            return ()
        count = self._count.value
        self._count.value = 0
        if count > len(self._numbers):
            raise RuntimeError(f"{count} launches in one call: the virtual GPU notes {len(self._numbers)}")
        return tuple(self._numbers[:count])

    def path(self, number: int) -> str:
        """The path of cubin ``number``; of one that was loaded from memory, the kernel's name."""
        return os.fsdecode(self._path(number))

    def entry(self, number: int) -> str:
        """The cache entry that holds cubin ``number``."""
        return Path(self.path(number)).parent.name

    def take_unanswered(self) -> tuple[str, ...]:
        """Names of the CUDA calls that the virtual GPU did not answer since the last call."""
        if self._library is None:
            return ()
        names = tuple(self._unanswered.value.decode().split())
        self._unanswered.value = b""
        return names


class Worker:
    """Calls DeepGEMM in this process.

    Args:
        position: that of the whole job; it is kept up to date.
    """

    def __init__(self, job: SweepJob, device: Device, position: Position) -> None:
        self._job = job
        self._device = device
        self._position = self._whole = position
        self._log = LaunchLog(ctypes.CDLL(os.environ["VIRTUAL_GPU_LIBRARY"]) if device.virtual else None)

    def begin(self) -> Beginning:
        """Do what comes before all ops: the self-check, and counting the points. Raises `JobError`."""
        job, device, position, log = self._job, self._device, self._position, self._log
        position.op = protocol.CHECKING
        if job.self_check:
            log.take()
            self._check_tensors_are_read_right()
        checked = tuple(map(log.entry, log.take()))
        counts = []
        for index, op in enumerate(job.ops):
            position.op = index
            try:
                op.function(device.deep_gemm)
            except LookupError as error:
                raise JobError("missing", str(error)) from None
            counts.append(len(op.points(device)))
        sm_counts = [op.sm_counts or job.sm_counts for op in job.ops]
        units = [
            (index, sm_count)
            for sm_count in sorted({count for counts in sm_counts for count in counts})
            for index in range(len(job.ops))
            if sm_count in sm_counts[index]
        ]
        self._whole.total = sum(counts[op] for op, _ in units)
        # One process makes one part of each op.
        size = max(_SMALLEST_PART, self._whole.total // (_PARTS_FOR_EACH * job.processes), _ALL * (job.processes == 1))
        parts = tuple(
            Part(op=op, sm_count=sm_count, first=first, last=min(first + size, counts[op]))
            for op, sm_count in units
            for first in range(0, max(counts[op], 1), size)
        )
        return Beginning(checked, parts, log.take_unanswered())

    def move_to(self, position: Position) -> None:
        """Be another process from now on, a fork, whose position is ``position``."""
        self._position = position
        # torch refuses a GPU that was used before the fork, because the driver does not know the new process. The
        # virtual GPU is memory of this process.
        self._device.torch.cuda._is_in_bad_fork = lambda: False

    def _check_tensors_are_read_right(self) -> None:
        """Have DeepGEMM bring scales of a known shape into TMA layout: the result must have that shape.

        A DeepGEMM built against another torch misreads tensors: it asserts (``dim == 2 or dim == 3``: sgl-deep-gemm
        0.1.7 under torch 2.11) or, worse, plans for another shape.
        """
        from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor

        rows, columns, aligned_rows = 70, 3, 72  # rows are padded to 16 bytes of float32
        try:
            scales = get_mn_major_tma_aligned_tensor(self._device.empty(rows, columns, dtype="float32"))
        except Exception as error:
            raise JobError("refused", text(error)) from error
        shape, strides = tuple(scales.shape), scales.stride()
        if shape != (rows, columns) or tuple(strides) != (1, aligned_rows):
            raise JobError("misreads", f"scales [{rows}, {columns}] came back as {shape}, {strides}")

    def do(self, parts: Sequence[Part], numbers: Iterable[int] | None = None) -> Iterator[PartResult]:
        """Call DeepGEMM at the points of all ``parts``, or of those whose places are ``numbers``.

        After a failure that ends the job, no part behind the failed one is begun, here or in another process.
        """
        for number in range(len(parts)) if numbers is None else numbers:
            if number > self._whole.first_failed:
                continue
            result = self._do(number, parts[number])
            if result.failure and _ends(self._job, result.failure):
                self._whole.first_failed = min(number, self._whole.first_failed)
            yield result

    def _do(self, number: int, part: Part) -> PartResult:
        spans: list[Span] = []
        failure, before = None, self._position.done
        try:
            self._device.deep_gemm.set_num_sms(part.sm_count)
            with self._device.torch.inference_mode():  # torch keeps no record for gradients: a sixth of a call
                self._call(part, spans)
        except Exception as error:
            failure = classify(self._device.torch, error).failure
        return PartResult(
            part=number,
            spans=tuple(spans),
            calls=self._position.done - before,
            failure=failure,
            value=self._position.value,
            unanswered=self._log.take_unanswered(),
        )

    def _call(self, part: Part, spans: list[Span]) -> None:
        """Call DeepGEMM at each point; adds a span for consecutive points that launched the same kernels."""
        op, device, position, log = self._job.ops[part.op], self._device, self._position, self._log
        points = op.points(device)
        position.op, position.value = part.op, points.start  # a refusal while preparing counts as the op's own
        call = op.prepare(device)
        log.take()  # preparing launches torch's kernels, not the op's
        launched: tuple[int, ...] | None = None
        first = last = 0

        def end_span() -> None:
            if launched is not None:
                spans.append(Span(first=first, last=last, step=points.step, entries=tuple(map(log.entry, launched))))

        try:
            for value in points[part.first : part.last]:
                position.value = value
                call(value)
                position.done += 1
                now = log.take()
                if now != launched:
                    end_span()
                    launched, first = now, value
                last = value
        finally:
            end_span()
        if not device.virtual:
            device.torch.cuda.synchronize()  # an error of the last launches belongs to this op


def _ends(job: SweepJob, failure: Failure) -> bool:
    """Whether the job ends with this failure of a call."""
    return not job.go_on or failure.kind == "memory"


@dataclass(frozen=True)
class Beginning:
    """What is known before the first op is called.

    Attributes:
        checked: entries that the self-check launched.
        parts: all parts, in the manifest's order.
        unanswered: as of `PartResult`.
    """

    checked: tuple[str, ...]
    parts: tuple[Part, ...]
    unanswered: tuple[str, ...]


@dataclass(frozen=True)
class Joined:
    """The results of all parts as those of whole ops, in the manifest's order."""

    sweeps: tuple[OpSweep, ...]
    refusals: tuple[Refusal, ...]
    calls: int


def join(job: SweepJob, beginning: Beginning, results: Iterable[PartResult], position: Position) -> Joined:
    """Join the results of all parts.

    An op ends at its first refused call, and a job that does not go on ends there as well: what other processes called
    behind it does not count.

    Args:
        position: gets the place of the failure that is raised.

    Raises:
        JobError: the first failure that ends the job, in the manifest's order; or CUDA calls before it were not
            answered, since an error that followed from these says less.
    """
    parts, result_of = beginning.parts, {result.part: result for result in results}
    sweeps: list[OpSweep] = []
    refusals: list[Refusal] = []
    unanswered = dict.fromkeys(beginning.unanswered)
    error, calls = None, 0
    for (sm_count, op), members in itertools.groupby(range(len(parts)), lambda number: parts[number].unit):
        spans: list[Span] = []
        for result in map(result_of.__getitem__, members):
            unanswered |= dict.fromkeys(result.unanswered)
            calls += result.calls
            _add(spans, result.spans)
            if failure := result.failure:
                if _ends(job, failure):
                    position.op, position.value = op, result.value
                    error = JobError(failure.kind, failure.reason)
                else:
                    refusals.append(Refusal(op=op, sm_count=sm_count, value=result.value, text=failure.reason))
                break
        if error:
            break
        sweeps.append(OpSweep(op=op, sm_count=sm_count, spans=tuple(spans)))
    if unanswered:
        raise JobError("unanswered", ", ".join(unanswered))
    if error:
        raise error
    return Joined(tuple(sweeps), tuple(refusals), calls)


def _add(spans: list[Span], more: Iterable[Span]) -> None:
    """Append ``more`` to ``spans``; two that touch and launched the same become one."""
    for span in more:
        if spans and spans[-1].last + span.step == span.first and spans[-1].entries == span.entries:
            span = span.model_copy(update={"first": spans.pop().first})
        spans.append(span)
