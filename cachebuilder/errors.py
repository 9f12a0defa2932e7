"""Every expected failure: one exception tree, one exit code for each kind.

An error's text says what was wanted and what was found; its ``hint`` says what to do next.
"""

from __future__ import annotations


class CacheBuilderError(Exception):
    """Base of every failure that the command line reports in one sentence."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ManifestError(CacheBuilderError):
    """The manifest cannot be read, or does not describe something that can be built."""

    exit_code = 3


class InstallationError(CacheBuilderError):
    """This machine lacks something needed here: torch, DeepGEMM, a C compiler."""

    exit_code = 4


class ToolchainError(CacheBuilderError):
    """No nvcc, or not the one asked for."""

    exit_code = 5


class PlanError(CacheBuilderError):
    """DeepGEMM refused a shape, or the sweep could not be trusted."""

    exit_code = 6


class CompileError(CacheBuilderError):
    """nvcc refused at least one kernel."""

    exit_code = 7


class ArtifactError(CacheBuilderError):
    """An artifact is damaged, hostile, or of a schema this version does not read."""

    exit_code = 8


class CompatibilityError(CacheBuilderError):
    """The artifact was built for something else than what serves here: DeepGEMM would not find its kernels."""

    exit_code = 9


class RestoreError(CacheBuilderError):
    """The destination holds something different, or cannot be written."""

    exit_code = 10


class VerifyError(CacheBuilderError):
    """Serving from this cache would compile: a kernel is missing, or an entry is damaged."""

    exit_code = 11


class DeviceError(CacheBuilderError):
    """There is no GPU here, not the one that was asked for, or it cannot do what was asked of it."""

    exit_code = 12


class ModelError(CacheBuilderError):
    """A model's config cannot be read, or the engine would not serve the model with DeepGEMM."""

    exit_code = 13


class SignatureError(CacheBuilderError):
    """An artifact without a signature by a key that is trusted here, or a key that cannot be used."""

    exit_code = 14


class TransferError(CacheBuilderError):
    """A registry or a store cannot be reached, refuses, or gives something else than what was asked for."""

    exit_code = 15


class RecordingError(CacheBuilderError):
    """The recorded program asked DeepGEMM's compiler for nothing, or cannot be recorded as it is set up."""

    exit_code = 16


class CommandError(CacheBuilderError):
    """The command that was to serve cannot be run; the code is the one of env(1) and of shells."""

    exit_code = 127


#: What ``cachebuilder --help`` prints; click itself exits with 2 on a wrong command line.
EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "diff: the two differ",
    2: "wrong command line",
    ManifestError.exit_code: "bad manifest",
    InstallationError.exit_code: "torch, DeepGEMM or a C compiler is missing or unusable",
    ToolchainError.exit_code: "no nvcc, or not the one asked for",
    PlanError.exit_code: "DeepGEMM refused a shape, or the plan could not be trusted",
    CompileError.exit_code: "a kernel did not compile",
    ArtifactError.exit_code: "bad artifact",
    CompatibilityError.exit_code: "this environment would miss: fingerprint mismatch",
    RestoreError.exit_code: "a different entry is already there, or the destination cannot be written",
    VerifyError.exit_code: "the cache would miss, or is damaged",
    DeviceError.exit_code: "no GPU, another GPU than the target, or a kernel is wrong on it",
    ModelError.exit_code: "a bad config.json, or a model that the engine does not serve with DeepGEMM",
    SignatureError.exit_code: "no valid signature by a trusted key, or a key that cannot be used",
    TransferError.exit_code: "a registry or store cannot be reached, refuses, or gives something else than asked for",
    RecordingError.exit_code: "nothing was recorded",
    CommandError.exit_code: "run: CMD was not found or cannot be run; else CMD's own code",
    130: "interrupted",
}
