"""The exact bias of every straight-through gradient, by enumeration and quadrature.

The hard values are enumerated. Where a gradient depends on the noise, the noise is integrated given
each value, by the trapezoid rule in logistic variables, whose error is below 1e-11 at the
temperatures here. :func:`bias_table` has all rows; ``python -m tests.distributions.biases`` prints
them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from pyro_nondiff import noise
from pyro_nondiff.distributions import (
    StraightThroughBernoulli,
    StraightThroughOneHotCategorical,
)
from pyro_nondiff.noise import Request

GRADIENTS = ("identity", "selected", "softmax", "gumbel", "gumbel_rao", "reinmax")
TEMPERED = ("softmax", "gumbel", "gumbel_rao", "reinmax")
NOISY = ("gumbel", "gumbel_rao")
DEGREES = {"linear": 1, "quadratic": 2, "cubic": 3}

Law = Callable[[Tensor], Any]
Cost = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Case:
    """A program of discrete factors, and a cost that is a power of a multilinear function.

    Arguments:
        name: Of the factors.
        parameters: By name.
        sizes: How many values each factor has; a Bernoulli has one logit and two values.
        one_hot: Whether the factors are one-hot.
        logits: The logits of each factor, from the parameters and the values of those before.
        base: The function whose powers are the costs.
    """

    name: str
    parameters: dict[str, Tensor]
    sizes: tuple[int, ...]
    one_hot: bool
    logits: Callable[[dict[str, Tensor], Sequence[Tensor]], Tensor]
    base: Cost


def _double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _chain(slope: float) -> Case:
    def logits(parameters: dict[str, Tensor], before: Sequence[Tensor]) -> Tensor:
        return parameters["last"] + slope * before[0] if before else parameters["first"]

    return Case(
        "two dependent Bernoullis" if slope else "two independent Bernoullis",
        {"first": _double(-0.4)[0], "last": _double(0.6)[0]},
        (2, 2),
        False,
        logits,
        lambda z: 0.8 * z[0] + 1.1 * z[1] + 0.9 * z[0] * z[1] - 0.2,
    )


CASES = (
    Case(
        "one Bernoulli",
        {"logit": _double(-0.4)[0]},
        (2,),
        False,
        lambda parameters, _: parameters["logit"],
        lambda z: z[0] - 0.2,
    ),
    Case(
        "one 3-way one-hot",
        {"logits": _double(0.3, -0.5, 0.1)},
        (3,),
        True,
        lambda parameters, _: parameters["logits"],
        lambda z: (z[0] * _double(0.5, -1.0, 1.3)).sum(-1) - 0.2,
    ),
    _chain(0.0),
    _chain(1.2),
)


@dataclass(frozen=True)
class Row:
    """A gradient's expectation in one case, and what it should be.

    Arguments:
        factors: The case.
        parameter: Whose gradient it is: of the first or last of two factors, or of the only one.
        gradient: The choice.
        temperature: Of the surrogate.
        cost: ``"linear"``, ``"quadratic"`` or ``"cubic"`` in each factor.
        exact: The exact gradient of the expected cost.
        mean: The expectation of the straight-through gradient.
    """

    factors: str
    parameter: str
    gradient: str
    temperature: float
    cost: str
    exact: tuple[float, ...]
    mean: tuple[float, ...]

    @property
    def bias(self) -> float:
        """The largest absolute difference."""
        return max(abs(m - e) for m, e in zip(self.mean, self.exact, strict=True))

    @property
    def relative(self) -> float:
        """The bias by the largest absolute value of the exact gradient."""
        return self.bias / max(abs(e) for e in self.exact)


def nodes(step: float = 0.35, width: float = 27.0) -> tuple[Tensor, Tensor]:
    """Nodes of a logistic variable and their probabilities."""
    t = torch.arange(-width, width + step, step, dtype=torch.float64)
    weights = t.sigmoid() * (-t).sigmoid()
    return t, weights / weights.sum()


@dataclass(frozen=True)
class Axis:
    """The noise of one factor: each value, and points of the noise that make it.

    Arguments:
        values: The hard value of each point, a number or one-hot.
        nodes: Logistic variables of each point, ``(points, 0, 1 or 2)``; none where noise is moot.
        weights: The probability of each point given its value.
    """

    values: Tensor
    nodes: Tensor
    weights: Tensor

    @staticmethod
    def of(size: int, is_one_hot: bool, noisy: bool) -> "Axis":
        """All values of a factor, each with the points of a quadrature if ``noisy``."""
        t, w = nodes() if noisy else (_double(0.0), _double(1.0))
        if is_one_hot:
            t, w = torch.cartesian_prod(t, t), torch.cartesian_prod(w, w).prod(-1)
        else:
            t = t.unsqueeze(-1)
        index = torch.arange(size).repeat_interleave(len(t))
        values = one_hot(index, size) if is_one_hot else index
        return Axis(values.double(), t.repeat(size, 1), w.repeat(size))

    def noise(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The noise of rows, given their logits, and the fresh noise behind it."""
        value, t = self.values[rows], self.nodes[rows]
        if value.dim() == 1:
            return logistic_given(logits, value, t[:, 0]), t[:, 0]
        fresh = _gumbels(value, t)
        return gumbel_given(logits, value, fresh), fresh


def logistic_given(logits: Tensor, value: Tensor, node: Tensor) -> Tensor:
    """Logistic noise that makes a Bernoulli value.

    Its uniform is ``1 - p (1 - s)`` for 1 and ``(1 - p) s`` for 0, with ``s = sigmoid(node)``.
    """
    one = softplus(-logits) + softplus(node)  # -log(1 - u)
    zero = softplus(logits) + softplus(-node)  # -log(u)
    odds = torch.where(value > 0, one, zero)
    return torch.where(value > 0, 1.0, -1.0) * (odds + (-torch.expm1(-odds)).log())


def gumbel_given(logits: Tensor, value: Tensor, fresh: Tensor) -> Tensor:
    """Gumbel noise that makes a one-hot value, up to what it adds to all: no gradient sees that.

    Of fresh exponentials ``E``, 1 for the chosen category, the others' perturbed logits are
    ``-log(1 + E exp(-log p))`` below that of the chosen one.
    """
    log_probs = logits.log_softmax(-1)
    below = torch.where(value > 0, 0.0, -softplus(-fresh - log_probs))
    return below - logits


def _gumbels(value: Tensor, t: Tensor) -> Tensor:
    """Gumbels relative to the chosen category's, of logistic variables ``(rows, 2)``.

    Ratios ``r`` of exponentials have density ``2 / (1 + r1 + r2)^3``: the first is the odds of a
    logistic variable, and the second, over ``1 + r1``, has survival function ``(1 + q)^-2``.
    """
    first = t[:, 0]
    second = softplus(first) + torch.expm1(softplus(t[:, 1]) / 2).log()
    logs = torch.stack([torch.zeros_like(first), first, second], -1)
    chosen = value.argmax(-1, keepdim=True)
    order = torch.arange(3).expand_as(value)
    place = torch.where(order == chosen, 0, torch.where(order < chosen, order + 1, order))
    return -logs.gather(-1, place)


class Quadrature:
    """A source of noise that lays the points of all factors' axes side by side, as rows.

    Arguments:
        axes: One for each factor, in the order in which they are drawn.
    """

    def __init__(self, axes: Sequence[Axis]) -> None:
        self.axes = axes
        index = [torch.arange(len(axis.weights)) for axis in axes]
        self.rows = torch.cartesian_prod(*index).reshape(-1, len(axes))
        self.weight = torch.ones(len(self.rows), dtype=torch.float64)
        self._next = 0
        self._fresh = torch.zeros(())

    def __call__(self, request: Request) -> Tensor:
        if request.role == "v":  # one conditional noise: the mean of several is the same
            return self._fresh.reshape(request.shape)
        axis, rows = self.axes[self._next], self.rows[:, self._next]
        self._next += 1
        law: Any = request.law
        logits = law.logits.detach()
        noise_, self._fresh = axis.noise(logits, rows)
        score = law.log_prob(axis.values[rows]).detach()
        self.weight = self.weight * axis.weights[rows] * score.exp()
        return noise_.reshape(request.shape)


def law_of(case: Case, gradient: str, temperature: float, rows: int) -> Law:
    """The straight-through law of logits, the same in all rows or not."""
    kind: Any = StraightThroughOneHotCategorical if case.one_hot else StraightThroughBernoulli
    options = {"temperature": temperature, "gradient": gradient, "num_conditional": 1}

    def law(logits: Tensor) -> Any:
        shape = (rows, *logits.shape[-1:]) if case.one_hot else (rows,)
        return kind(logits=logits.expand(shape), **options)

    return law


def expected_gradients(
    case: Case, gradient: str, temperature: float, cost: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The expectation of a straight-through gradient, for each parameter of a case."""
    noisy = gradient in NOISY
    source = Quadrature([Axis.of(size, case.one_hot, noisy) for size in case.sizes])
    law = law_of(case, gradient, temperature, len(source.rows))
    parameters = {name: p.clone().requires_grad_() for name, p in case.parameters.items()}
    values: list[Tensor] = []
    with noise.source(source):
        for _ in case.sizes:
            values.append(law(case.logits(parameters, values)).rsample())
    for column, (axis, value) in enumerate(zip(source.axes, values, strict=True)):
        if not torch.equal(value, axis.values[source.rows[:, column]]):
            raise ValueError("the noise does not make the value that it is for")
    return _gradients((source.weight * cost(case.base(values))).sum(), parameters)


def exact_gradients(case: Case, cost: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The exact gradient of the expected cost, by enumeration of Pyro's own laws."""
    parameters = {name: p.clone().requires_grad_() for name, p in case.parameters.items()}
    axes = [Axis.of(size, case.one_hot, noisy=False) for size in case.sizes]
    rows = torch.cartesian_prod(*[torch.arange(size) for size in case.sizes])
    rows = rows.reshape(-1, len(axes))
    values: list[Tensor] = []
    score = torch.zeros(len(rows), dtype=torch.float64)
    for column, axis in enumerate(axes):
        logits = case.logits(parameters, values)
        values.append(axis.values[rows[:, column]])
        if case.one_hot:
            score = score + (logits.log_softmax(-1) * values[-1]).sum(-1)
        else:
            score = score + values[-1] * logits - softplus(logits)
    return _gradients((score.exp() * cost(case.base(values))).sum(), parameters)


def _gradients(total: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(total, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


@cache
def bias_table(temperatures: tuple[float, ...] = (0.5, 1.0)) -> tuple[Row, ...]:
    """Every gradient, in every case, for a linear, a quadratic and a cubic cost.

    Arguments:
        temperatures: Of those gradients that have one.
    """
    rows = []
    for case in CASES:
        for cost, degree in DEGREES.items():

            def power(y: Tensor, degree: int = degree) -> Tensor:
                return y**degree

            exact = exact_gradients(case, power)
            for gradient in GRADIENTS:
                for temperature in temperatures if gradient in TEMPERED else (1.0,):
                    mean = expected_gradients(case, gradient, temperature, power)
                    for name in case.parameters:
                        pair = (tuple(x[name].reshape(-1).tolist()) for x in (exact, mean))
                        rows.append(Row(case.name, name, gradient, temperature, cost, *pair))
    return tuple(rows)


def main() -> None:
    """Prints the table: the bias by the largest absolute value of the exact gradient."""
    by_line: dict[tuple[str, str, str, float], dict[str, Row]] = {}
    for row in bias_table():
        line = row.factors, row.parameter, row.gradient, row.temperature
        by_line.setdefault(line, {})[row.cost] = row
    print("factors | parameter | gradient | T |", " | ".join(DEGREES))  # noqa: T201
    for line, by_cost in by_line.items():
        numbers = " | ".join(f"{by_cost[cost].relative:.3g}" for cost in DEGREES)
        print(" | ".join(map(str, line)), "|", numbers)  # noqa: T201


if __name__ == "__main__":
    main()
