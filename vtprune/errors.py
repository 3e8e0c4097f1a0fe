"""The exceptions and warnings of vtprune: each says what was wrong and what would be right."""

from __future__ import annotations


class VTPruneError(ValueError):
    """Bad input or an unsupported combination; the message names both."""


class InputError(VTPruneError):
    """The request cannot be carried out as it stands; the message says what would be right."""


class CannotCut(VTPruneError):
    """A method cannot cut an image to its budget; such an image is kept whole, and its report says why."""


class UntrainedWarning(UserWarning):
    """A method that has to be trained runs with weights that nobody has trained."""


class UncheckedBaseWarning(UserWarning):
    """Nothing says on which base model some weights were trained, so it cannot be told whether this is it."""


class KeptWholeWarning(UserWarning):
    """An image cannot be cut to its budget by the method that it was given, and goes through the model whole."""


class UnknownPrunerError(VTPruneError, KeyError):
    """No pruner is registered under that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnsupportedModelError(VTPruneError, TypeError):
    """No adapter knows this model."""


class UnsupportedCacheError(VTPruneError, TypeError):
    """This kind of KV cache cannot hold layers of different lengths."""


class ScoreError(VTPruneError):
    """A pruner produced NaN or infinite scores."""


class PictureError(VTPruneError):
    """A file holds no picture that can be read; the message names it."""


class FileError(VTPruneError):
    """A file that was read does not hold what it should; the message names it and what is wrong."""


class RunError(RuntimeError):
    """The work failed on the way, through no fault of the request; what was computed before is kept."""


class WriteError(VTPruneError, RunError):
    """A file could not be written; what stood there before is unchanged."""
