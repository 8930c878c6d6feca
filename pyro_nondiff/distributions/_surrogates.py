r"""What a hard value is differentiated as, instead of itself.

Each surrogate :math:`s` takes a law with logits :math:`\eta`, a temperature :math:`T`, the hard
value :math:`z` and the noise :math:`\epsilon` that made it. :math:`\rho` is the logistic function
for a Bernoulli and the softmax for a one-hot law.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli

from ..noise import Request, draw
from ._relax import conditional, relax, wide_logits

NUM_CONDITIONAL = 16
"""How many conditional draws ``"gumbel_rao"`` averages, if nothing else is said."""


@dataclass(frozen=True)
class Drawn:
    """A hard value and what it was made of."""

    law: Any
    logits: Tensor
    hard: Tensor
    noise: Tensor
    temperature: float | Tensor
    num_conditional: int


def identity(drawn: Drawn) -> Tensor:
    r"""The probabilities: :math:`s = \rho(\eta)`."""
    return _probabilities(drawn)


def selected(drawn: Drawn) -> Tensor:
    r"""The probability of what was chosen: :math:`s = z \rho(\eta)`."""
    return drawn.hard * _probabilities(drawn)


def softmax(drawn: Drawn) -> Tensor:
    r"""The probabilities at a temperature: :math:`s = \rho(\eta / T)`."""
    return relax(drawn.law, drawn.logits, drawn.temperature)


def gumbel(drawn: Drawn) -> Tensor:
    r"""The relaxed value: :math:`s = \rho((\eta + \epsilon) / T)`."""
    return relax(drawn.law, drawn.logits + drawn.noise, drawn.temperature)


def gumbel_rao(drawn: Drawn) -> Tensor:
    r"""The mean relaxed value over noise that makes the same hard value."""
    shape = (drawn.num_conditional, *drawn.hard.shape)
    kind = "logistic" if isinstance(drawn.law, Bernoulli) else "gumbel"
    request = Request("", kind, shape, drawn.logits.dtype, drawn.logits.device, "v", drawn.law)
    fresh = draw(request)
    with torch.no_grad():  # the conditional noise is held constant, not its place
        leaf, hard = torch.broadcast_tensors(drawn.logits, drawn.hard)
        perturbed = conditional(drawn.law, leaf, hard, fresh)
    return relax(drawn.law, perturbed + _nothing(drawn.logits), drawn.temperature).mean(0)


def reinmax(drawn: Drawn) -> Tensor:
    r""":math:`s = 2 \rho(\eta - \bar\eta + \rho^{-1}(\pi)) - \rho(\eta) / 2`.

    Here :math:`\pi = (z + \rho(\eta / T)) / 2`, and :math:`\bar\eta` is :math:`\eta` held constant.
    """
    with torch.no_grad():
        middle = (drawn.hard + softmax(drawn)) / 2
        place = middle.logit() if isinstance(drawn.law, Bernoulli) else middle.log()
    there = relax(drawn.law, place + _nothing(drawn.logits), 1.0)
    return 2 * there - 0.5 * relax(drawn.law, drawn.logits, 1.0)


def _probabilities(drawn: Drawn) -> Tensor:
    """The probabilities, with the gradient to what the law was made of."""
    found: Tensor = drawn.law.probs
    return found.to(drawn.logits.dtype)


def _nothing(logits: Tensor) -> Tensor:
    """Zeros with the gradient of logits; a category that is taken out has none."""
    finite = logits.masked_fill(logits == -torch.inf, 0)
    return finite - finite.detach()


SURROGATES: dict[str, Callable[[Drawn], Tensor]] = {
    "identity": identity,
    "selected": selected,
    "softmax": softmax,
    "gumbel": gumbel,
    "gumbel_rao": gumbel_rao,
    "reinmax": reinmax,
}


def surrogate(
    name: str, law: Any, hard: Tensor, noise: Tensor, temperature: Any, num_conditional: int
) -> Tensor:
    """The surrogate of a hard value, by the name of its gradient."""
    drawn = Drawn(law, wide_logits(law), hard, noise, temperature, num_conditional)
    return SURROGATES[name](drawn)
