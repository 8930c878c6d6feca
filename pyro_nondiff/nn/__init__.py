"""Modules that models with something non-differentiable need.

Each is an ordinary ``torch.nn.Module``. What has no derivative in it is an op of
:mod:`pyro_nondiff.ops`, so that a handler around the program says how it is smoothed.
"""

from ._batchify import batchify as batchify
from ._localization import Localization as Localization
from .attention import AbstractAttention as AbstractAttention
from .attention import AdditiveAttention as AdditiveAttention
from .attention import DotProductAttention as DotProductAttention

__all__ = [
    "AbstractAttention",
    "AdditiveAttention",
    "DotProductAttention",
    "Localization",
    "batchify",
]
