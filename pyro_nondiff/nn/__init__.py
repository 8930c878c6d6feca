"""Modules that models with something non-differentiable need.

Each is an ordinary ``torch.nn.Module``. What has no derivative in it is an op of
:mod:`pyro_nondiff.ops`, so that a handler around the program says how it is smoothed.
"""

from ._batchify import batchify as batchify
from ._localization import Localization as Localization
from ._sparse import AbstractSparse as AbstractSparse
from ._sparse import SparseConv2d as SparseConv2d
from ._sparse import SparseLinear as SparseLinear
from ._sparsity import compression as compression
from ._sparsity import prune as prune
from ._sparsity import weight_kl as weight_kl
from .attention import AbstractAttention as AbstractAttention
from .attention import AdditiveAttention as AdditiveAttention
from .attention import DotProductAttention as DotProductAttention

__all__ = [
    "AbstractAttention",
    "AbstractSparse",
    "AdditiveAttention",
    "DotProductAttention",
    "Localization",
    "SparseConv2d",
    "SparseLinear",
    "batchify",
    "compression",
    "prune",
    "weight_kl",
]
