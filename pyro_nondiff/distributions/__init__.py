"""What can be drawn.

Discrete laws with a pathwise gradient, relaxed laws, and what the engine asks of every law: its
score, its logits, and its value as a map of noise. For all else use Pyro's own.
"""

from ._laws import Law as Law
from ._laws import core as core
from ._laws import describe as describe
from ._laws import dtype_and_device as dtype_and_device
from ._laws import log_prob as log_prob
from ._laws import logits as logits
from ._laws import rewrap as rewrap
from ._relax import base_row as base_row
from ._relax import conditional as conditional
from ._relax import relax as relax
from ._relax import relaxable as relaxable
from ._relax import wide_logits as wide_logits
from ._surrogates import NUM_CONDITIONAL as NUM_CONDITIONAL
from ._transport import continuous as continuous
from ._transport import noise_kind as noise_kind
from ._transport import noise_shape as noise_shape
from ._transport import transport as transport
from .hard_concrete import HardConcrete as HardConcrete
from .relaxed import RelaxedBernoulli as RelaxedBernoulli
from .relaxed import RelaxedOneHotCategorical as RelaxedOneHotCategorical
from .relaxed import relaxed as relaxed
from .straight_through import StraightThroughBernoulli as StraightThroughBernoulli
from .straight_through import StraightThroughOneHotCategorical as StraightThroughOneHotCategorical
from .straight_through import check_gradient as check_gradient
from .temperature import AbstractSchedule as AbstractSchedule
from .temperature import ExponentialAnnealing as ExponentialAnnealing
from .temperature import LinearAnnealing as LinearAnnealing
from .temperature import Temperature as Temperature
from .temperature import check_temperature as check_temperature

__all__ = [
    "NUM_CONDITIONAL",
    "AbstractSchedule",
    "ExponentialAnnealing",
    "HardConcrete",
    "Law",
    "LinearAnnealing",
    "RelaxedBernoulli",
    "RelaxedOneHotCategorical",
    "StraightThroughBernoulli",
    "StraightThroughOneHotCategorical",
    "Temperature",
    "base_row",
    "check_gradient",
    "check_temperature",
    "conditional",
    "continuous",
    "core",
    "describe",
    "dtype_and_device",
    "log_prob",
    "logits",
    "noise_kind",
    "noise_shape",
    "relax",
    "relaxable",
    "relaxed",
    "rewrap",
    "transport",
    "wide_logits",
]
