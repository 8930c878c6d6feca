"""What can be drawn.

Discrete laws with a pathwise gradient, relaxed laws, and what the engine asks of every law: its
score, its logits, and its value as a map of noise. For all else use Pyro's own.
"""

from ._laws import Law as Law
from ._laws import core as core
from ._laws import describe as describe
from ._laws import dtype_and_device as dtype_and_device
from ._laws import entropy as entropy
from ._laws import log_prob as log_prob
from ._laws import logits as logits
from ._laws import partly_pathwise as partly_pathwise
from ._laws import rewrap as rewrap
from ._laws import score_correction as score_correction
from ._parameters import base_row as base_row
from ._parameters import event_dims as event_dims
from ._parameters import parameters as parameters
from ._parameters import with_parameters as with_parameters
from ._relax import conditional as conditional
from ._relax import relax as relax
from ._relax import relaxable as relaxable
from ._relax import wide_logits as wide_logits
from ._surrogates import NUM_CONDITIONAL as NUM_CONDITIONAL
from ._transport import continuous as continuous
from ._transport import noise_concentration as noise_concentration
from ._transport import noise_kind as noise_kind
from ._transport import noise_shape as noise_shape
from ._transport import transport as transport
from .exponential import InverseCDFExponential as InverseCDFExponential
from .gamma import Gamma as Gamma
from .gamma import ScaleGamma as ScaleGamma
from .hard_concrete import HardConcrete as HardConcrete
from .log_gamma import LogGamma as LogGamma
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
    "Gamma",
    "HardConcrete",
    "InverseCDFExponential",
    "Law",
    "LinearAnnealing",
    "LogGamma",
    "RelaxedBernoulli",
    "RelaxedOneHotCategorical",
    "ScaleGamma",
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
    "entropy",
    "event_dims",
    "log_prob",
    "logits",
    "noise_concentration",
    "noise_kind",
    "noise_shape",
    "parameters",
    "partly_pathwise",
    "relax",
    "relaxable",
    "relaxed",
    "rewrap",
    "score_correction",
    "transport",
    "wide_logits",
    "with_parameters",
]
