"""What can go wrong, and the exit code each failure gives the command line.

Every message names the value seen, what was expected and the remedy.
"""


class DualLoraError(Exception):
    """Base of the errors a user can cause and mend; ``exit_code`` is what the command line returns."""

    exit_code = 1


class ConfigError(DualLoraError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 2


class DataError(DualLoraError, ValueError):
    """A data file is missing, empty or malformed."""

    exit_code = 3


class IntegrityError(DualLoraError):
    """A file is damaged, or an adapter does not belong to this base model."""

    exit_code = 4


class NonFiniteError(DualLoraError):
    """A loss, gradient or weight is NaN or infinite."""

    exit_code = 5


class LockedError(DualLoraError):
    """Another process is writing to this folder."""

    exit_code = 6


class DiskError(DualLoraError):
    """The disk is full, or a path cannot be written."""

    exit_code = 7


class OutOfMemoryError(DualLoraError):
    """The model or the batch does not fit in memory."""

    exit_code = 8
