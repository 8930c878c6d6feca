r"""Marsaglia and Tsang's sampler of Gamma numbers, as a map of what it accepts.

A proposal :math:`\epsilon \sim \mathcal{N}(0, 1)` becomes
:math:`h(\epsilon) = d (1 + c \epsilon)^3` with :math:`d = \alpha - 1/3` and
:math:`c = 1 / \sqrt{9 d}`, for a concentration :math:`\alpha \ge 1`.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

NUM_PROPOSALS = 8
"""One is rejected with probability 0.049 at most, so all with 3e-11 at most: then it is 0."""


def first_accepted(concentration: Tensor, proposals: Tensor, thresholds: Tensor) -> Tensor:
    """The first accepted of several proposals.

    No value is waited for: all proposals are judged at once. Behind them stands 0, the middle of
    the law, which is always accepted.

    Arguments:
        concentration: At least 1, without gradient, of the shape of one proposal.
        proposals: Standard normal, the proposals in the first dimension.
        thresholds: Logarithms of uniform numbers, of the same shape.
    """
    root, third = _scales(concentration)
    cube = (1 + proposals * root) ** 3
    log_cube = cube.clamp(min=torch.finfo(cube.dtype).tiny).log()
    accepted = (cube > 0) & (thresholds < proposals**2 / 2 + third * (1 - cube + log_cube))
    all_proposals = torch.cat([proposals, torch.zeros_like(proposals[:1])])
    accepted = torch.cat([accepted, torch.ones_like(accepted[:1])])
    first = accepted.to(torch.uint8).argmax(0, keepdim=True)
    return all_proposals.gather(0, first)[0]


def accepted_value(concentration: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the value of an accepted proposal, and the log-density of the proposal.

    Both have a gradient to the concentration at a fixed proposal.
    """
    root, third = _scales(concentration)
    log_base = torch.log1p(accepted * root)
    log_value = third.log() + 3 * log_base
    log_density = (concentration - 1) * log_value - log_value.exp() - torch.lgamma(concentration)
    log_slope = (3 * third * root).log() + 2 * log_base
    return log_value, log_density + log_slope


def unboost(concentration: Tensor, noise: Tensor) -> Tensor:
    r"""The logarithm of the factor from a Gamma of concentration + B to one of concentration.

    .. math:: \sum_{i=0}^{B-1} \frac{\log u_i}{\alpha + i}

    Arguments:
        concentration: :math:`\alpha`.
        noise: Logistic noise, whose :math:`u = \sigma(\mathrm{noise})`, B in the first dimension.
    """
    steps = torch.arange(len(noise), dtype=noise.dtype, device=noise.device)
    steps = steps.reshape(-1, *[1] * (noise.dim() - 1))
    return (logsigmoid(noise) / (concentration + steps)).sum(0)


def _scales(concentration: Tensor) -> tuple[Tensor, Tensor]:
    """Marsaglia and Tsang's ``c`` and ``d``."""
    third = concentration - 1 / 3
    return (9 * third).rsqrt(), third
