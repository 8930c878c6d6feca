"""Hard values with the gradient of smooth ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..distributions import Temperature, check_temperature
from ..distributions.temperature import current
from ..errors import NonDiffError
from ..ops import argmax, step
from ..ops._op import plain
from .base import AbstractHandler, Sites

__all__ = ["straight_through"]


class straight_through(AbstractHandler):
    r"""The hard value, exactly, differentiated as a surrogate.

    .. math:: z = \mathrm{onehot}(\mathrm{argmax}(s)), \qquad
        \frac{\partial z}{\partial s} := \frac{\partial}{\partial s} \rho(s)

    with the softmax :math:`\rho`, or, for ``step``, the logistic function, and by ``gradient``:

    ==============  ============================================================
    ``"softmax"``   :math:`\rho(s / T)`
    ``"identity"``  :math:`\rho(s)`: the incoming gradient goes to the probability
    ``"selected"``  :math:`z \rho(s)`: it goes there for what was chosen
    ==============  ============================================================

    These are the surrogates of :class:`pyro_nondiff.distributions.StraightThroughOneHotCategorical`
    that need no noise. The others are about a value that was *drawn*: ``"gumbel"`` and
    ``"gumbel_rao"`` are made of its noise, and ``"reinmax"`` is exact to second order only for a
    value of that law. For these use :class:`randomize` with the estimator
    :class:`pyro_nondiff.estimators.StraightThrough`.

    Arguments:
        gradient: The surrogate.
        temperature: :math:`T`: a number, a tensor that broadcasts with the batch shape, or a
            schedule.
        sites: As for :class:`AbstractHandler`.

    Raises:
        NonDiffError: For another gradient, or a temperature that is not positive.

    Example:
        >>> from pyro_nondiff.handlers import straight_through
        >>> from pyro_nondiff.ops import step
        >>> x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
        >>> with straight_through():
        ...     h = step("h", x)
        >>> h.tolist(), torch.autograd.grad(h.sum(), x)
        ([0.0, 1.0, 1.0], (tensor([0.1966, 0.2500, 0.1966]),))

    References:
        | Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation
          (Bengio et al., 2013)
        | https://arxiv.org/abs/1308.3432
    """

    hard = True

    def __init__(
        self,
        gradient: str = "softmax",
        temperature: Temperature = 1.0,
        *,
        sites: Sites = None,
    ) -> None:
        if gradient not in _SURROGATES:
            raise NonDiffError(
                f"straight_through: gradient must be one of {list(_SURROGATES)}, found "
                f"{gradient!r}. Those of a drawn value are for randomize() with the estimator "
                "StraightThrough."
            )
        check_temperature("straight_through", temperature, validate=True)
        super().__init__(sites)
        self.gradient = gradient
        self.temperature = temperature

    def differentiate(
        self, hard: Tensor, scores: Tensor, soft: Callable[[Tensor], Tensor], event_dim: int
    ) -> Tensor:
        """The hard value with the gradient of the surrogate.

        Arguments:
            hard: The value.
            scores: What decides it.
            soft: The smooth function that stands for the hard one.
            event_dim: How many dimensions it mixes.
        """
        temperature = current(self.temperature, event_dim)
        surrogate = _SURROGATES[self.gradient](hard, scores, temperature, soft)
        return hard.detach() + (surrogate - surrogate.detach())


_SURROGATES: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda hard, scores, temperature, soft: soft(scores / temperature),
    "identity": lambda hard, scores, temperature, soft: soft(scores),
    "selected": lambda hard, scores, temperature, soft: hard * soft(scores),
}


@straight_through.rule(argmax)
def _(handler: straight_through, name: str, scores: Tensor, **options: Any) -> Tensor:
    hard = plain(argmax)(name, scores)
    return handler.differentiate(hard, scores, partial(Tensor.softmax, dim=-1), event_dim=1)


@straight_through.rule(step)
def _(handler: straight_through, name: str, x: Tensor, **options: Any) -> Tensor:
    return handler.differentiate(plain(step)(name, x), x, Tensor.sigmoid, event_dim=0)
