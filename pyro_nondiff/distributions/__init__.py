"""What can be drawn.

This release has no law of its own: Pyro's are used as they are. The room holds what
the engine asks of a law - its score, its logits, and its value as a map of noise.
"""

from ._laws import Law as Law
from ._laws import core as core
from ._laws import describe as describe
from ._laws import dtype_and_device as dtype_and_device
from ._laws import log_prob as log_prob
from ._laws import logits as logits
from ._relax import base_row as base_row
from ._relax import conditional as conditional
from ._relax import relax as relax
from ._relax import relaxable as relaxable
from ._relax import wide_logits as wide_logits
from ._transport import noise_kind as noise_kind
from ._transport import noise_shape as noise_shape
from ._transport import transport as transport

__all__ = [
    "Law",
    "base_row",
    "conditional",
    "core",
    "describe",
    "dtype_and_device",
    "log_prob",
    "logits",
    "noise_kind",
    "noise_shape",
    "relax",
    "relaxable",
    "transport",
    "wide_logits",
]
