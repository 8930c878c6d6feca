"""Oracles for estimators: exact gradients, and the exact law of an estimate.

Use :func:`certify` on an estimator of your own, inside a program small enough to
enumerate.
"""

from .certificate import Certificate as Certificate
from .certificate import certify as certify
from .certificate import exact_moments as exact_moments
from .exact import exact_gradient as exact_gradient
from .exact import exact_loss as exact_loss
from .quadrature import certify_soft as certify_soft
from .source import Enumeration as Enumeration
from .walk import Walk as Walk
from .walk import outcomes as outcomes

__all__ = [
    "Certificate",
    "Enumeration",
    "Walk",
    "certify",
    "certify_soft",
    "exact_gradient",
    "exact_loss",
    "exact_moments",
    "outcomes",
]
