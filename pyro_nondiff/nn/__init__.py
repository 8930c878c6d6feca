"""Modules that models with something non-differentiable need.

Each is an ordinary ``torch.nn.Module``. What has no derivative in it is an op of
:mod:`pyro_nondiff.ops`, so that a handler around the program says how it is smoothed.
"""

from .attention import AbstractAttention, AdditiveAttention, DotProductAttention

__all__ = ["AbstractAttention", "AdditiveAttention", "DotProductAttention"]
