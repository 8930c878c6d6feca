r"""The exact expectation of an estimator with soft worlds, by quadrature over its noise.

Each number of noise becomes a piece, in which every hard value is settled, and a node of the
trapezoid rule in a logistic variable :math:`s`, whose weight :math:`\sigma'(s)` makes the rule
converge exponentially. All combinations are base worlds of one vectorised run, each with its
weight. The second noise of a site takes the node of the first: the estimate is a sum of
functions of one of them alone, so its mean does not see the coupling (its variance does).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import noise
from ..distributions import core
from ..errors import NonDiffError
from ..infer import TraceEstimator_ELBO
from ..noise import Request
from .certificate import Certificate
from .exact import exact_gradient, gradients_of, parameters_of
from .source import CONTINUOUS, concentrations, rows_of

__all__ = ["certify_soft"]

Program = Callable[..., Any]


def certify_soft(
    elbo: TraceEstimator_ELBO,
    model: Program,
    guide: Program,
    *args: Any,
    step: float = 0.4,
    width: float = 25.0,
    nodes: int = 12,
    coupled: bool = True,
    **kwargs: Any,
) -> Certificate:
    r"""Compares an estimate that uses soft worlds with the exact gradient.

    The rule's error is about :math:`e^{-2 \pi^2 T / h}` for temperature :math:`T` and step
    :math:`h`, and :math:`e^{-w}` for width :math:`w`. The number of base worlds is exponential
    in the number of discrete elements: two is usual, three is much.

    Arguments:
        elbo: An objective; what its estimators have learnt is held fixed.
        model: A model that runs vectorised.
        guide: Its guide, of Bernoulli, Categorical and OneHotCategorical sites, and of continuous
            maps of noise.
        *args: Arguments of both.
        step: The distance :math:`h` of two nodes.
        width: The nodes reach from :math:`-w` to :math:`w`.
        nodes: The number of nodes of Gauss's rule for each continuous number.
        coupled: Whether the second noise takes the nodes of the first. Without, the variance
            is exact too, for twice as many dimensions.
        **kwargs: Keyword arguments of both.

    Raises:
        NonDiffError: At a site of another law, or a one-hot site with several hard rows.

    Example:
        >>> from pyro_nondiff.estimators import REBAR
        >>> from pyro_nondiff.infer import TraceEstimator_ELBO
        >>> from pyro_nondiff.testing import certify_soft
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))
        >>> def guide():
        ...     logit = pyro.param("logit", torch.tensor(0.3))
        ...     pyro.sample("z", dist.Bernoulli(logits=logit))
        >>> certificate = certify_soft(TraceEstimator_ELBO(REBAR()), model, guide)
        >>> certificate.bias < 1e-6
        True
    """
    mean, size = soft_mean(
        elbo, model, guide, args, kwargs, step=step, width=width, nodes=nodes, coupled=coupled
    )
    exact = exact_gradient(model, guide, *args, nodes=nodes, **kwargs)
    exact = {name: exact[name] for name in mean}
    nothing = {name: torch.full_like(value, torch.nan) for name, value in mean.items()}
    return Certificate(exact, mean, nothing, size)


def soft_mean(
    elbo: TraceEstimator_ELBO,
    model: Program,
    guide: Program,
    args: Any = (),
    kwargs: Any = MappingProxyType({}),
    *,
    step: float = 0.4,
    width: float = 25.0,
    nodes: int = 12,
    coupled: bool = True,
) -> tuple[dict[str, Tensor], int]:
    """The mean of the estimate for each parameter, and the number of base worlds."""
    elbo.differentiable_loss(model, guide, *args, **kwargs)  # plans, parameters and states exist
    num_hard = elbo.plan_of(model, guide, *args, **kwargs).num_hard
    grid = Grid(num_hard, np.arange(-width, width + step, step), nodes, coupled)
    with noise.source(grid):  # a first run finds the axes
        elbo.unreduced(model, guide, *args, **kwargs)
    grid.settle()
    many = elbo.vectorized(grid.size)
    many.unreduced(model, guide, *args, **kwargs)
    with noise.source(grid):
        surrogate = many.unreduced(model, guide, *args, **kwargs).surrogate
    found = parameters_of(model, guide)
    parameters = {name: p for name, p in found.items() if not name.startswith("estimator.")}
    mean = gradients_of((grid.weight.detach() * surrogate).sum(), parameters)
    return mean, grid.size


@dataclass
class Grid:
    """A source of noise that lays all combinations of pieces and nodes side by side.

    Arguments:
        num_hard: How many rows of a run are hard.
        logistic_nodes: The nodes of the trapezoid rule.
        continuous_nodes: The number of nodes of a continuous number.
        coupled: Whether the second noise of a site takes the nodes of the first.
    """

    num_hard: int
    logistic_nodes: np.ndarray[Any, np.dtype[np.float64]]
    continuous_nodes: int
    coupled: bool
    weight: Tensor = field(default_factory=lambda: torch.ones(()))
    _sizes: list[int] = field(default_factory=list)
    _settled: bool = False
    _axis: int = 0
    _last: dict[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of base worlds."""
        return int(np.prod(self._sizes, dtype=np.int64))

    def settle(self) -> None:
        """Says that all axes have been found."""
        self._settled = True

    def __call__(self, request: Request) -> Tensor:
        """The noise of one site in all base worlds."""
        if request.kind in CONTINUOUS:
            return self._continuous(request)
        if request.role == "v":
            return self._second(request)
        if isinstance(core(request.law), torch.distributions.Categorical):
            return self._categorical(request)
        if request.kind == "gumbel":
            return self._one_hot(request)
        return self._bernoulli(request)

    def _index(self, size: int) -> Tensor:
        """The coordinate of each base world on the next axis."""
        if not self._settled:
            self._sizes.append(size)
            return torch.zeros(1, dtype=torch.long)
        if self._axis == 0:
            self.weight = torch.ones(self.size, dtype=torch.float64)
        stride = int(np.prod(self._sizes[self._axis + 1 :], dtype=np.int64))
        index = torch.arange(self.size) // stride % self._sizes[self._axis]
        self._axis += 1
        return index

    def _node(self) -> Tensor:
        """A node of the trapezoid rule for each base world."""
        nodes = torch.from_numpy(self.logistic_nodes)
        weights = nodes.sigmoid() * (-nodes).sigmoid()
        index = self._index(len(nodes))
        self.weight = self.weight * (weights / weights.sum())[index]
        return nodes[index]

    def _piece(self, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of a piece of (0, 1) for each base world, from sorted cuts ``(n, K)``."""
        index = self._index(len(cuts) + 1).unsqueeze(0)
        zero, one = torch.zeros_like(cuts[:1]), torch.ones_like(cuts[:1])
        low = torch.cat([zero, cuts]).gather(0, index.expand(1, cuts.shape[1]))[0]
        high = torch.cat([cuts, one]).gather(0, index.expand(1, cuts.shape[1]))[0]
        self.weight = self.weight * (high - low)
        return low, high

    def _continuous(self, request: Request) -> Tensor:
        columns = []
        for concentration in concentrations(request)[: self._elements(request)]:
            nodes, weights = CONTINUOUS[request.kind](self.continuous_nodes, concentration)
            index = self._index(len(nodes))
            self.weight = self.weight * torch.from_numpy(weights / weights.sum())[index]
            columns.append(torch.from_numpy(nodes)[index])
        return torch.stack(columns, -1).reshape(request.shape)

    def _bernoulli(self, request: Request) -> Tensor:
        rows = self._hard_logits(request)
        if request.role == "antithetic":
            rows = torch.cat([rows, -rows])
        values, second = [], []
        for element in range(rows.shape[-1]):
            cuts = (-rows[..., element]).sigmoid().sort(0).values
            low, high = self._piece(cuts)
            node = self._node()
            values.append((low + (high - low) * node.sigmoid()).logit())
            second.append(node)
        self._last[request.site] = torch.stack(second, -1).reshape(request.shape)
        return torch.stack(values, -1).reshape(request.shape)

    def _one_hot(self, request: Request) -> Tensor:
        rows = self._hard_logits(request)
        size = request.shape[-1]
        if len(rows) > 1:
            raise NonDiffError(
                f"site '{request.site}': quadrature of a one-hot site needs one hard row, and "
                f"there are {len(rows)}. Put estimators with hard branches behind it."
            )
        logits = rows[0].reshape(rows.shape[1], -1, size)
        values, second = [], []
        for element in range(logits.shape[1]):
            value, fresh = self._gumbels(logits[:, element].log_softmax(-1))
            values.append(value)
            second.append(fresh)
        self._last[request.site] = torch.stack(second, 1).reshape(request.shape)
        return torch.stack(values, 1).reshape(request.shape)

    def _gumbels(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Gumbels of a chosen category, by the ratios of the others' exponentials to its own."""
        size = logits.shape[-1]
        chosen = self._index(size).expand(len(logits))
        self.weight = self.weight * logits.exp().gather(-1, chosen.unsqueeze(-1))[:, 0]
        ratios: list[Tensor] = []
        for k in range(1, size):
            before = 1 + sum(ratios, torch.zeros(()))
            ratios.append(before * torch.expm1(-torch.nn.functional.logsigmoid(-self._node()) / k))
        exponentials = torch.stack([torch.ones_like(ratios[0]), *ratios], -1)
        # the chosen category has the first exponential; the others keep their order
        order = torch.arange(size).expand(len(exponentials), size)
        place = chosen.expand(len(exponentials)).unsqueeze(-1)
        source = torch.where(order == place, 0, torch.where(order < place, order + 1, order))
        fresh = -exponentials.gather(-1, source).log()
        is_chosen = order == place
        top = fresh.gather(-1, place)
        perturbed = torch.where(is_chosen, top, -torch.logaddexp(-fresh - logits, -top))
        return perturbed - logits, fresh

    def _categorical(self, request: Request) -> Tensor:
        """Noise that gives each row the value at one point of its distribution function."""
        logits = self._all_rows(request)
        rows, worlds, _, size = logits.shape
        below = logits.softmax(-1).cumsum(-1)[..., :-1]
        columns = []
        for element in range(below.shape[2]):
            cuts = below[:, :, element].permute(0, 2, 1).reshape(-1, worlds).sort(0).values
            low, high = self._piece(cuts)
            middle = ((low + high) / 2).unsqueeze(-1)
            value = (below[:, :, element] <= middle).sum(-1)
            columns.append(torch.nn.functional.one_hot(value, size) * 1e4)
        noise_rows = torch.stack(columns, 2).to(logits.dtype)
        return noise_rows.reshape((rows, *request.shape[1:]) if rows > 1 else request.shape)

    def _second(self, request: Request) -> Tensor:
        if self.coupled:
            return self._last[request.site]
        if request.kind == "gumbel":
            raise NonDiffError("uncoupled quadrature serves Bernoulli sites")
        columns = [self._node() for _ in range(self._elements(request))]
        return torch.stack(columns, -1).reshape(request.shape)

    def _elements(self, request: Request) -> int:
        return torch.Size(request.shape).numel() // (self.size if self._settled else 1)

    def _all_rows(self, request: Request) -> Tensor:
        """The logits of all rows, ``(rows, K, elements, categories)``."""
        logits = rows_of(core(request.law).logits.detach(), request.shape)
        worlds = self.size if self._settled else 1
        return logits.reshape(len(logits), worlds, -1, logits.shape[-1])

    def _hard_logits(self, request: Request) -> Tensor:
        """The logits of the hard rows, ``(rows, K, elements)``."""
        logits = rows_of(core(request.law).logits.detach(), request.shape)
        hard = logits[: self.num_hard] if len(logits) > 1 else logits
        return hard.reshape(len(hard), self.size if self._settled else 1, -1)
