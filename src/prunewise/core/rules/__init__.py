"""What each ATen operation does to labels, one small function an operation family."""

from prunewise.core.rules import contract, norm, pointwise, shape, spatial

__all__ = ["contract", "norm", "pointwise", "shape", "spatial"]
