"""Errors that a user can cause.

Each message names what was wrong, where, and what to do about it. The command line prints
the message alone and exits with code 2; a library user sees an ordinary exception with a type
to catch. Anything that is not a :class:`NetwrightError` is a defect of ours.
"""

__all__ = [
    "ArtifactError",
    "ClosureError",
    "CorruptRunError",
    "DataError",
    "GradientError",
    "MissingDataError",
    "NetwrightError",
    "NonFiniteLossError",
    "NothingToPruneError",
    "RecipeError",
    "RunDirectoryError",
    "RunLockedError",
    "SettingError",
    "StateDictError",
    "TargetError",
    "TaskError",
    "TraceError",
    "TransformError",
]


class NetwrightError(Exception):
    """What was wrong, where, and what to do."""


class TaskError(NetwrightError):
    """A task that cannot be found, loaded or used."""


class DataError(NetwrightError):
    """A dataset that is empty, overlapping, of the wrong shape, or not finite."""


class MissingDataError(DataError):
    """A built-in dataset whose files are nowhere on this machine."""


class RecipeError(NetwrightError):
    """A training recipe with an unknown name or an impossible setting."""


class SettingError(NetwrightError, ValueError):
    """A method's argument that is of the wrong kind or outside its range."""


class ClosureError(NetwrightError, RuntimeError):
    """An optimizer's closure that is missing or returns the wrong thing."""


class GradientError(NetwrightError, RuntimeError):
    """Gradients that a method cannot use: sparse, missing, or on several devices."""


class StateDictError(NetwrightError, ValueError):
    """A saved state that belongs to another method."""


class NonFiniteLossError(NetwrightError):
    """Training met a loss that is NaN or infinite."""


class TraceError(NetwrightError):
    """A model that ``torch.export`` cannot trace."""


class NothingToPruneError(NetwrightError):
    """A model in which no unit can be proved safe to remove."""


class TransformError(NetwrightError):
    """A compression step with an impossible setting, or one that found nothing to work on."""


class ArtifactError(NetwrightError):
    """A model that cannot be exported, or an artifact that cannot be read."""


class TargetError(NetwrightError):
    """A target that does not parse, or names a metric or unit that does not exist."""


class RunDirectoryError(NetwrightError):
    """An output folder that cannot be used."""


class RunLockedError(RunDirectoryError):
    """An output folder that another live process is writing."""


class CorruptRunError(RunDirectoryError):
    """A file of a run directory that is truncated or not what it should be."""
