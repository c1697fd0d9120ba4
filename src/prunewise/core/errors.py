"""The errors of prunewise. Every one names the thing that is wrong and the remedy."""

from __future__ import annotations


class PrunewiseError(Exception):
    """Base class of all errors that prunewise raises on purpose."""


class TraceError(PrunewiseError):
    """The model could not be run on the example inputs to learn its structure."""


class NoPrunableGroupError(PrunewiseError):
    """Nothing in the model can be removed; the message says what pins it."""


class BudgetError(PrunewiseError, ValueError):
    """A budget is not a valid number, or cannot be met; the message says what the floor is."""


class PlanError(PrunewiseError, ValueError):
    """A plan does not fit the model it is applied to, or is malformed."""


class AlreadyGatedError(PrunewiseError):
    """Gates are attached to this model already."""


class NonFiniteError(PrunewiseError, ArithmeticError):
    """A loss, a gate or a gradient is NaN or infinite."""


class SharedParameterError(PrunewiseError):
    """A parameter is used outside the model as well, so slicing it would break its other user."""


class VerificationError(PrunewiseError):
    """The small model does not compute what the gated one does. This is a defect of prunewise: please report it."""


class CheckpointError(PrunewiseError, ValueError):
    """A saved plan or model is damaged, hostile, of another version, or belongs to another architecture."""


class DataError(PrunewiseError, ValueError):
    """A data loader, a batch or a setting of the training cannot be used."""


class SparsityError(PrunewiseError, ValueError):
    """A total sparsity, a floor or an importance of layers cannot be met; the message says what can."""


class MethodError(PrunewiseError, ValueError):
    """A pruning method gave something else than a keep mask of the count asked for, or does not suit the layer."""
