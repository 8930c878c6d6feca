"""How a gradient is estimated: one family a file.

=============================  ==================  ==========================================
estimator                      laws                evaluations of the program
=============================  ==================  ==========================================
:class:`REINFORCE`             any                 1
:class:`RLOO`                  any                 ``num_samples``
:class:`DisARM`                Bernoulli           1 + 1 a site
:class:`REBAR`                 relaxable           1 + 2 relaxed a site
:class:`RELAX`                 relaxable           1 + 2 relaxed a site, or 1
:class:`Enumerate`             finite support      1 + the size of the support, a site
:class:`Pathwise`              with ``rsample``    1
:class:`StraightThrough`       relaxable           1, biased
:class:`LAX`                   maps of noise       1
:class:`MeasureValued`         Bernoulli, Poisson  1 + 1 a number of the site, or + 3 for a
                               Exponential, Gamma  Normal
                               Normal
:class:`Auto`                  any                 1 or 4
=============================  ==================  ==========================================
"""

from .base import AbstractEstimator as AbstractEstimator
from .base import Ask as Ask
from .base import Context as Context
from .base import Draw as Draw
from .base import Estimate as Estimate
from .baselines import AbstractBaseline as AbstractBaseline
from .baselines import MovingAverage as MovingAverage
from .baselines import NeuralBaseline as NeuralBaseline
from .baselines import Reading as Reading
from .control_variates import REBAR as REBAR
from .control_variates import RELAX as RELAX
from .coupled import DisARM as DisARM
from .exact import Enumerate as Enumerate
from .lax import LAX as LAX
from .measure_valued import MeasureValued as MeasureValued
from .pathwise import Auto as Auto
from .pathwise import CorrectedPathwise as CorrectedPathwise
from .pathwise import Pathwise as Pathwise
from .score import REINFORCE as REINFORCE
from .score import RLOO as RLOO
from .straight_through import StraightThrough as StraightThrough

__all__ = [
    "LAX",
    "REBAR",
    "REINFORCE",
    "RELAX",
    "RLOO",
    "AbstractBaseline",
    "AbstractEstimator",
    "Ask",
    "Auto",
    "Context",
    "CorrectedPathwise",
    "DisARM",
    "Draw",
    "Enumerate",
    "Estimate",
    "MeasureValued",
    "MovingAverage",
    "NeuralBaseline",
    "Pathwise",
    "Reading",
    "StraightThrough",
]
