"""Every error that this library raises on purpose.

::

    PETError (ValueError)
    ├── ArgumentError             an argument is out of range, or two arguments contradict each other
    ├── TargetError               a target pattern hits nothing, or hits something that cannot host the method
    ├── DeadSiteError             no inserted delta ran and received a gradient
    ├── OptimizerMismatchError    the optimizer does not hold the delta, or holds what it must not
    ├── NotMergeableError         the delta cannot be added into the base weights exactly
    ├── UnsupportedStrategyError  the Trainer's strategy (or a callback order) cannot train a delta correctly
    └── DeltaFileError            a file is damaged, unsafe, of another format, or does not fit the model; see ``.code``
        └── BaseMismatchError     the delta was trained on another base model

Each message says what was found, what was expected, and what to do about it.
"""

from typing import Literal

FileErrorCode = Literal["io", "limit", "corrupt", "version", "schema", "mismatch", "base", "nonfinite", "unsafe"]


class PETError(ValueError):
    """Root of all errors raised on purpose by lightning_pet."""


class ArgumentError(PETError):
    """An argument is out of range, or two arguments contradict each other."""


class TargetError(PETError):
    """A target pattern hits nothing, or hits something that cannot host the method."""


class DeadSiteError(PETError):
    """No inserted delta ran and received a gradient."""


class OptimizerMismatchError(PETError):
    """The optimizer does not hold the delta, or its saved state belongs to other parameters."""


class NotMergeableError(PETError):
    """The delta cannot be added into the base weights exactly."""


class UnsupportedStrategyError(PETError):
    """The Trainer's strategy, or the order of its callbacks, cannot train a delta correctly."""


class DeltaFileError(PETError):
    """A delta file or checkpoint cannot be used.

    Attributes:
        code: the kind of fault: ``io`` (the operating system refused), ``limit`` (larger than the
            caller allows), ``corrupt`` (bytes do not match their digest), ``version`` (written by a
            newer format), ``schema`` (unknown or ill-typed field), ``mismatch`` (missing, extra or
            misshapen tensor), ``base`` (another base model), ``nonfinite`` (NaN or infinity),
            ``unsafe`` (pickle, special file, or a path that leaves its folder).
    """

    def __init__(self, message: str, code: FileErrorCode) -> None:
        super().__init__(message)
        self.code: FileErrorCode = code

    def __reduce__(self) -> tuple[type["DeltaFileError"], tuple[str, FileErrorCode]]:
        # The default rebuilds from ``args`` alone, which would lose the code across processes.
        return (type(self), (str(self), self.code))


class BaseMismatchError(DeltaFileError):
    """The delta was trained on another base model than the one it meets."""

    def __init__(self, message: str, code: FileErrorCode = "base") -> None:
        super().__init__(message, code)
