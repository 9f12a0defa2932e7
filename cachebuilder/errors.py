"""Every expected failure: one exception for each kind, each with an exit code of its own.

An error's text says what was wanted and what was found. Its ``hint`` says what to do next.
"""

from __future__ import annotations


class CacheBuilderError(Exception):
    """Base of every failure that the command line reports as a message, without a traceback.

    Attributes:
        hint: what to do next, in one sentence; None if nothing is known to help.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ManifestError(CacheBuilderError):
    """The manifest cannot be read, or it describes nothing that can be built."""

    exit_code = 3


class InstallationError(CacheBuilderError):
    """Something that is needed is missing on this machine or does not work: torch, DeepGEMM, a C compiler, a folder."""

    exit_code = 4


class ToolchainError(CacheBuilderError):
    """There is no nvcc, or none of the release that the manifest wants or that DeepGEMM takes."""

    exit_code = 5


class PlanError(CacheBuilderError):
    """DeepGEMM refused a shape, or what it asked for cannot be trusted."""

    exit_code = 6


class CompileError(CacheBuilderError):
    """nvcc refused at least one kernel, or made other code of it than DeepGEMM's own call would."""

    exit_code = 7


class ArtifactError(CacheBuilderError):
    """An artifact cannot be read or written, is damaged or hostile, or has a schema that this version cannot read."""

    exit_code = 8


class CompatibilityError(CacheBuilderError):
    """The artifact was built for another environment than the one that serves: DeepGEMM would not find its kernels."""

    exit_code = 9


class RestoreError(CacheBuilderError):
    """The destination holds a different entry, or cannot be written."""

    exit_code = 10


class VerifyError(CacheBuilderError):
    """Serving from this cache would compile a kernel: one is missing or was missed, or an entry is damaged."""

    exit_code = 11


class DeviceError(CacheBuilderError):
    """There is no GPU or another one than was asked for, or a kernel fails or computes something wrong on it."""

    exit_code = 12


class ModelError(CacheBuilderError):
    """A model's config cannot be read, or the engine would not serve the model with DeepGEMM."""

    exit_code = 13


class SignatureError(CacheBuilderError):
    """An artifact has no valid signature by a trusted key, or a key cannot be used."""

    exit_code = 14


class TransferError(CacheBuilderError):
    """A registry or an object store cannot be reached, refuses a request, or sends something that was not asked for."""

    exit_code = 15


class RecordingError(CacheBuilderError):
    """The recorded program asked for no kernel, or its setup makes a recording impossible."""

    exit_code = 16


class StoreError(CacheBuilderError):
    """A shared store has another result under a key than this build made: one of the two is wrong."""

    exit_code = 17


class CommandError(CacheBuilderError):
    """The program that `run` should start cannot be run. env(1) and shells exit with the same code."""

    exit_code = 127


#: What ``cachebuilder --help`` prints; click itself exits with 2 on a wrong command line.
EXIT_CODES: dict[int, str] = {
    0: "success",
    1: "diff: the two differ",
    2: "wrong command line",
    ManifestError.exit_code: "bad manifest",
    InstallationError.exit_code: "torch, DeepGEMM or a C compiler is missing or does not work",
    ToolchainError.exit_code: "no nvcc, or none of the release that the manifest or DeepGEMM wants",
    PlanError.exit_code: "DeepGEMM refused a shape, or its answers cannot be trusted",
    CompileError.exit_code: "a kernel did not compile, or compiled to the wrong code",
    ArtifactError.exit_code: "an artifact is damaged, or cannot be read or written",
    CompatibilityError.exit_code: "the artifact does not fit this environment: kernels would not be found",
    RestoreError.exit_code: "the destination holds a different entry, or cannot be written",
    VerifyError.exit_code: "a kernel is missing from the cache or was missed, or an entry is damaged",
    DeviceError.exit_code: "no GPU, another GPU than the target, or a kernel is wrong on it",
    ModelError.exit_code: "bad config.json, or the engine does not serve the model with DeepGEMM",
    SignatureError.exit_code: "no valid signature by a trusted key, or a key cannot be used",
    TransferError.exit_code: "a registry or store cannot be reached, refuses, or sends the wrong thing",
    RecordingError.exit_code: "nothing was recorded",
    StoreError.exit_code: "a shared store has another result for the same kernel or plan",
    CommandError.exit_code: "run: CMD cannot be run; otherwise CMD's own exit code",
    130: "interrupted",
}
