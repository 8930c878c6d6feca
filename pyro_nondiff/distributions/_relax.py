r"""Soft values: a discrete law's value with the step replaced by a slope.

A Bernoulli or one-hot value is a step of its *perturbed logits* :math:`z = \eta + \epsilon`
(logistic or Gumbel noise :math:`\epsilon`). The soft value is :math:`\sigma(z / T)` or
:math:`\mathrm{softmax}(z / T)`. Given the hard value, the perturbed logits have a law of
their own, and :func:`conditional` draws from it, in log space:

==================  ======================================================================
hard value          perturbed logits, with fresh noise :math:`\nu`
==================  ======================================================================
Bernoulli 1         :math:`\mathrm{softplus}(\nu - \log \sigma(-\eta))`
Bernoulli 0         :math:`-\mathrm{softplus}(\nu - \log \sigma(\eta))`
one-hot, chosen     :math:`\nu_i + \mathrm{logsumexp}(\eta)`
one-hot, others     :math:`-\mathrm{logaddexp}(-\nu_j - \eta_j, -z_i)`
==================  ======================================================================

References:
    | REBAR: Low-variance, unbiased gradient estimates for discrete latent variable models
      (Tucker et al., 2017)
    | https://arxiv.org/abs/1703.07370
"""

import torch
from torch import Tensor
from torch.distributions import Bernoulli, OneHotCategorical
from torch.nn.functional import softplus

from ._laws import Law, core, logits
from ._maps import NoiseMap


def relaxable(law: Law) -> bool:
    """Whether a law has soft values."""
    base = core(law)
    if not isinstance(base, Bernoulli | OneHotCategorical):
        return False
    return isinstance(base, NoiseMap) or not base.has_rsample


def wide_logits(law: Law) -> Tensor:
    """The logits of a relaxable law, in at least float32."""
    found = logits(law)
    if found is None:
        raise TypeError(f"{type(law).__name__} has no logits")
    return found.to(torch.promote_types(found.dtype, torch.float32))


def relax(law: Law, perturbed: Tensor, temperature: float | Tensor) -> Tensor:
    """The soft value of perturbed logits, in (0, 1) and, for one-hot, of sum 1."""
    if isinstance(core(law), Bernoulli):
        return (perturbed / temperature).sigmoid()
    return (perturbed / temperature).softmax(-1)


def conditional(law: Law, leaf: Tensor, value: Tensor, noise: Tensor) -> Tensor:
    """Perturbed logits given the hard value, differentiable in the logits ``leaf``.

    Arguments:
        law: A relaxable law.
        leaf: Its logits.
        value: The hard value.
        noise: Fresh noise of the law's kind.
    """
    if isinstance(core(law), Bernoulli):
        sign = torch.where(value > 0, 1.0, -1.0).to(leaf.dtype)
        return sign * softplus(noise + softplus(sign * leaf))
    chosen = value > 0
    top = (noise * value).sum(-1, keepdim=True) + leaf.logsumexp(-1, keepdim=True)
    return torch.where(chosen, top, -torch.logaddexp(-noise - leaf, -top))
