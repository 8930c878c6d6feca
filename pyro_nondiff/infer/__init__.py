"""Objectives: they run programs in worlds, collect costs, and ask the estimators."""

from .compiled import CompiledSVI as CompiledSVI
from .config import config_estimator as config_estimator
from .elbo import EstimatorELBOModule as EstimatorELBOModule
from .elbo import TraceEstimator_ELBO as TraceEstimator_ELBO
from .elbo import TraceREBAR_ELBO as TraceREBAR_ELBO
from .elbo import TraceREINFORCE_ELBO as TraceREINFORCE_ELBO
from .elbo import TraceRELAX_ELBO as TraceRELAX_ELBO
from .expected_cost import ExpectedCost as ExpectedCost
from .expected_cost import no_guide as no_guide
from .objective import Step as Step
from .plan import Branches as Branches
from .plan import Plan as Plan

__all__ = [
    "Branches",
    "CompiledSVI",
    "EstimatorELBOModule",
    "ExpectedCost",
    "Plan",
    "Step",
    "TraceEstimator_ELBO",
    "TraceREBAR_ELBO",
    "TraceREINFORCE_ELBO",
    "TraceRELAX_ELBO",
    "config_estimator",
    "no_guide",
]
