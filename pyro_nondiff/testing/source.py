"""A source of noise that goes through all outcomes instead of drawing.

A discrete value changes only where its noise crosses a threshold, so noise is a finite
number of pieces, each with a probability. Where a law differs between rows, the pieces
are those of all rows together, so that one piece settles the value of every row.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributions import core
from ..errors import NonDiffError
from ..noise import Request
from .walk import Walk

__all__ = ["Enumeration"]


class Enumeration:
    """A :func:`pyro_nondiff.noise.source` that takes noise from a :class:`Walk`.

    Logistic noise is cut at the logits of all rows, and at their negatives where an
    estimator uses the noise's negative. Gumbel noise is replaced by noise that gives each
    row the value at one point of its distribution function: each row has its own law,
    and the expectation of an estimator, a sum over rows, is not changed by how they are
    coupled. Normal, exponential, Gamma and Rayleigh noise takes the nodes of Gauss's rules.

    Arguments:
        walk: The path to follow.
        nodes: The number of quadrature nodes of one number.

    Attributes:
        coupled: Whether the rows of every site so far were coupled as they are when noise is
            drawn, which a variance depends on.
    """

    def __init__(self, walk: Walk, nodes: int = 12) -> None:
        self.walk = walk
        self.nodes = nodes
        self.coupled = True

    def __call__(self, request: Request) -> Tensor:
        if request.kind in CONTINUOUS:
            return self._continuous(request)
        logits = rows_of(core(request.law).logits.detach(), request.shape)
        if request.kind == "gumbel":
            self.coupled &= bool((logits == logits[:1]).all())
            noise = self._gumbel(logits)
            return noise if len(noise) > 1 else noise.reshape(request.shape)
        if request.role == "antithetic":
            logits = torch.cat([logits, -logits])
        elif request.role != "u":
            raise NonDiffError(
                f"site '{request.site}': Enumeration knows noise of role 'u' and 'antithetic', "
                f"not {request.role!r}."
            )
        return self._logistic(logits).reshape(request.shape)

    def _continuous(self, request: Request) -> Tensor:
        chosen = []
        for concentration in concentrations(request):
            nodes, weights = CONTINUOUS[request.kind](self.nodes, concentration)
            chosen.append(nodes[self.walk.choose(list(weights / weights.sum()))])
        return torch.tensor(chosen, dtype=request.dtype).reshape(request.shape)

    def _logistic(self, logits: Tensor) -> Tensor:
        columns = (-logits).reshape(logits.shape[0], -1).T
        chosen = [self._piece(sorted(set(column.tolist()))) for column in columns]
        return torch.tensor(chosen, dtype=logits.dtype)

    def _piece(self, cuts: list[float]) -> float:
        """A number of one of the pieces between cuts, by its logistic probability."""
        below = torch.tensor([*cuts, torch.inf], dtype=torch.float64).sigmoid()
        probabilities = below.diff(prepend=below.new_zeros(1)).tolist()
        inner = [(a + b) / 2 for a, b in pairwise(cuts)]
        return [cuts[0] - 1, *inner, cuts[-1] + 1][self.walk.choose(probabilities)]

    def _gumbel(self, logits: Tensor) -> Tensor:
        rows, size = logits.shape[0], logits.shape[-1]
        below = logits.double().softmax(-1).cumsum(-1)
        noise = torch.zeros_like(logits)
        flat, cumulative = noise.reshape(rows, -1, size), below.reshape(rows, -1, size)
        for element in range(flat.shape[1]):
            cuts = torch.cat([cumulative[:, element, :-1].flatten(), below.new_ones(1)]).unique()
            chosen = self.walk.choose(cuts.diff(prepend=cuts.new_zeros(1)).tolist())
            start = cuts[chosen - 1] if chosen else cuts.new_zeros(())
            value = (cumulative[:, element, :-1] <= start).sum(-1)
            flat[torch.arange(rows), element, value] = _LARGE
        return flat.reshape(logits.shape)


Rule = tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]


def concentrations(request: Request) -> list[float]:
    """One for each number of noise; 1 for noise that has none."""
    given = request.concentration
    found = torch.ones(()) if given is None else given.detach()
    concentrations: list[float] = found.expand(request.shape).flatten().tolist()
    return concentrations


@cache
def _hermite(nodes: int, concentration: float) -> Rule:
    """Gauss-Hermite: exact for polynomials of a normal number of degree below twice the nodes."""
    return np.polynomial.hermite_e.hermegauss(nodes)


@cache
def _laguerre(nodes: int, concentration: float) -> Rule:
    """Gauss-Laguerre by Golub and Welsch's eigenvalues: the same for a Gamma number."""
    order = np.arange(nodes)
    off = np.sqrt(order[1:] * (order[1:] + concentration - 1))
    matrix = np.diag(2 * order + concentration) + np.diag(off, 1) + np.diag(off, -1)
    values, vectors = np.linalg.eigh(matrix)
    return values, vectors[0] ** 2


@cache
def _rayleigh(nodes: int, concentration: float) -> Rule:
    """Gauss's rule for a Rayleigh number: the same for polynomials, of even and odd degree.

    Lanczos's recurrence on a fine rule, beyond whose end there is a probability below 1e-30.
    """
    x, fine = np.polynomial.legendre.leggauss(8 * nodes + 100)
    x = 6 * (1 + x)
    basis = [np.sqrt(fine * x * np.exp(-(x**2) / 2))]
    basis[0] /= np.linalg.norm(basis[0])
    for _ in range(nodes - 1):
        new = x * basis[-1]
        for _ in range(2):  # once more, against rounding
            new = new - sum(vector * (vector @ new) for vector in basis)
        basis.append(new / np.linalg.norm(new))
    vectors = np.stack(basis)
    values, own = np.linalg.eigh(vectors * x @ vectors.T)
    return values, own[0] ** 2


CONTINUOUS: dict[str, Callable[[int, float], Rule]] = {
    "normal": _hermite,
    "exponential": _laguerre,
    "gamma": _laguerre,
    "rayleigh": _rayleigh,
}
"""The rule for each kind of continuous noise."""

_LARGE = 1e4  # beyond any difference of logits


def rows_of(logits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Logits with their rows first, and the noise's own dimensions behind."""
    full = torch.broadcast_shapes(logits.shape, shape)
    has_rows = len(full) == len(shape) > 0 and full[0] > shape[0]
    return logits.expand(full) if has_rows else logits.expand(full).unsqueeze(0)
