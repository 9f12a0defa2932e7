"""Further options and variables of an engine that bear on shapes: each one is read or refused, none is ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cachebuilder.errors import ModelError


@dataclass(frozen=True)
class Switches:
    """What further options and variables of the engine set.

    Attributes:
        dense_tp: SGLang: how many ranks a dense MLP is divided among (1, or all).
        draft_tokens: SGLang: how many query rows a request has while its drafts are verified.
        fuse_shared: SGLang: run the shared expert as a routed one, also where that is not the default; or never.
        overlap_batches: vLLM: two halves of a batch run at once, one communicating on ``communicating_sms``.
    """

    dense_tp: int | None = None
    draft_tokens: int | None = None
    fuse_shared: bool | None = None
    overlap_batches: bool | None = None
    communicating_sms: int = 20


@dataclass(frozen=True)
class Known:
    """The options and variables that an engine's rules know.

    Attributes:
        read: name → the field of `Switches` and its value; None: the number that follows.
        refused: name → what it changes, which no rule here covers.
    """

    read: Mapping[str, tuple[str, bool | None]]
    refused: Mapping[str, str]

    def switches(self, arguments: Sequence[str]) -> Switches:
        """What ``arguments`` set: ``--name``, ``--name VALUE``, ``--name=VALUE`` or ``VARIABLE=VALUE``.

        Raises:
            ModelError: one of them is refused or not known, or has no number where it needs one.
        """
        values: dict[str, int | bool | None] = {}
        rest = [part for argument in arguments for part in argument.split("=", 1)]
        while rest:
            name = rest.pop(0)
            if reason := self.refused.get(name):
                raise ModelError(
                    f"{name}: {reason}: no rule here covers that",
                    hint="observe the engine (cachebuilder observe), or record it (cachebuilder record)",
                )
            if name not in self.read:
                raise ModelError(
                    f"wanted options of the engine that bear on shapes, {', '.join(self.read)}, found {name}",
                    hint="leave out what no shape depends on; for what a rule should read, record the engine",
                )
            field, value = self.read[name]
            if value is None:
                text = rest.pop(0) if rest else ""
                if not text.isdecimal() or not 0 < int(text) <= 1 << 20:
                    raise ModelError(f"{name}: wanted a whole number above 0, found {text!r:.40}")
                values[field] = int(text)
                continue
            if not name.startswith("-") and rest and rest.pop(0).lower() in ("0", "false"):
                continue
            values[field] = value
        return Switches(**values)  # type: ignore[arg-type]
