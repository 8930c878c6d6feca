"""Hard values: with no gradient, with a surrogate's, or recorded in an earlier run."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pyro.poutine import Trace
from torch import Tensor

from ..distributions import Temperature, check_temperature
from ..distributions.temperature import current
from ..errors import NonDiffError
from ..ops import argmax, step
from ..ops._op import Call, plain
from .base import AbstractHandler, Sites

__all__ = ["ignore", "replay", "straight_through"]


class ignore(AbstractHandler):
    """The hard value, and no gradient to what decides it: the lecture's "ignore it".

    That is what every op does with no handler: this says so, and keeps the handlers outside away.
    What does not decide keeps its gradient: the chosen item of a ``select``.

    Arguments:
        sites: As for :class:`AbstractHandler`.

    Example:
        >>> from pyro_nondiff.handlers import ignore, soften
        >>> from pyro_nondiff.ops import argmax
        >>> with soften(), ignore(sites="hard"):
        ...     argmax("hard", torch.tensor([0.0, 1.0])), argmax("soft", torch.tensor([0.0, 1.0]))
        (tensor([0., 1.]), tensor([0.2689, 0.7311]))

    References:
        | Fast R-CNN (Girshick, 2015), whose pooling has no gradient to the box
        | https://arxiv.org/abs/1504.08083
    """

    hard = True

    def __init__(self, *, sites: Sites = None) -> None:
        super().__init__(sites)

    def _find(self, call: Call) -> Callable[..., Any]:
        return plain(call.op)


class replay(AbstractHandler):
    """The value that an op had in an earlier run: nothing is computed, called or differentiated.

    So a program can be run again without asking the person or the simulator behind an ``external``.
    For sample sites, also those that ``randomize`` makes, there is ``pyro.poutine.replay``.

    Arguments:
        values: A trace, or a mapping from names to values. Ops that it does not name pass.
        sites: As for :class:`AbstractHandler`; a name that ``values`` lacks is an error.

    Example:
        >>> from pyro_nondiff.handlers import replay
        >>> from pyro_nondiff.ops import external
        >>> def program():
        ...     return external("answer", lambda: input("how many? "))
        >>> replay({"answer": torch.tensor(3)})(program)()
        tensor(3)
    """

    def __init__(self, values: Trace | Mapping[str, Any], *, sites: Sites = None) -> None:
        super().__init__(sites)
        if isinstance(values, Trace):
            nodes = values.nodes.items()
            values = {name: site["value"] for name, site in nodes if site["type"] == "sample"}
        self.values = dict(values)

    def _find(self, call: Call) -> Callable[..., Any] | None:
        if call.name in self.values:
            value = self.values[call.name]
            return lambda *args, **kwargs: value.detach()
        if self.sites is None:
            return None
        raise NonDiffError(
            f"replay has no value for op '{call.name}': it knows {sorted(self.values)}. Take the "
            "name out of sites."
        )


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

    def differentiate(self, hard: Tensor, scores: Tensor, soft: Callable[[Tensor], Tensor]) -> Any:
        """The hard value with the gradient of the surrogate.

        Arguments:
            hard: The value.
            scores: What decides it.
            soft: The softmax or the logistic function.
        """
        temperature = current(self.temperature, 1 if soft is _softmax else 0)
        surrogate = _SURROGATES[self.gradient](hard, scores, temperature, soft)
        return hard.detach() + (surrogate - surrogate.detach())


_softmax = partial(Tensor.softmax, dim=-1)

_SURROGATES: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda hard, scores, temperature, soft: soft(scores / temperature),
    "identity": lambda hard, scores, temperature, soft: soft(scores),
    "selected": lambda hard, scores, temperature, soft: hard * soft(scores),
}


@straight_through.rule(argmax)
def _(handler: straight_through, name: str, scores: Tensor, **options: Any) -> Any:
    return handler.differentiate(plain(argmax)(name, scores), scores, _softmax)


@straight_through.rule(step)
def _(handler: straight_through, name: str, x: Tensor, **options: Any) -> Any:
    return handler.differentiate(plain(step)(name, x), x, Tensor.sigmoid)
