"""Smoothing by noise on the inputs: perturbed optimisers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import NonDiffError
from ..noise import Request, draw
from ..ops import argmax, external, step
from ..ops._op import plain
from .base import AbstractHandler, Sites

__all__ = ["perturb"]


class perturb(AbstractHandler):
    r"""The mean answer over noise on what decides it: perturbed optimisers.

    .. math:: y_\sigma(s) = \mathbb{E}[y(s + \sigma Z)], \qquad
        \frac{\partial y_\sigma}{\partial s} = \frac{1}{\sigma} \mathbb{E}[y(s + \sigma Z) Z^\top],
        \qquad Z \sim \mathcal{N}(0, 1)

    Both are estimated from the same ``num_samples`` draws. That of the gradient is unbiased for any
    :math:`y`: it only calls it, so that it serves a solver behind an ``external`` too. There, all
    arguments that are tensors of floats are perturbed; keep what should not be in ``fn``. A
    ``select`` sums its items by the mean choice.

    The noise is drawn outside sample sites: the objectives' check of worlds says that it is
    skipped.

    Arguments:
        num_samples: How many draws. A ``batched`` function gets them at once.
        sigma: :math:`\sigma`, in units of what decides.
        sites: As for :class:`AbstractHandler`.

    Raises:
        NonDiffError: If an argument is not positive; for an ``external`` without a tensor of
            floats.

    Example:
        >>> from pyro_nondiff.handlers import perturb
        >>> from pyro_nondiff.ops import argmax
        >>> scores = torch.tensor([0.0, 0.0, 1.0], requires_grad=True)
        >>> with perturb(num_samples=1000, sigma=0.5):
        ...     z = argmax("z", scores)
        >>> z
        tensor([0.0630, 0.0720, 0.8650], grad_fn=<AddBackward0>)
        >>> torch.autograd.grad(z[2], scores)
        (tensor([-0.1804, -0.1907,  0.3742]),)

    References:
        | Learning with Differentiable Perturbed Optimizers (Berthet et al., 2020)
        | https://arxiv.org/abs/2002.08676
    """

    def __init__(self, num_samples: int = 100, sigma: float = 1.0, *, sites: Sites = None) -> None:
        for argument, given in (("num_samples", num_samples), ("sigma", sigma)):
            if not 0 < given < math.inf:
                raise NonDiffError(f"perturb: {argument} must be positive, found {given}")
        super().__init__(sites)
        self.num_samples = num_samples
        self.sigma = sigma

    def mean(
        self,
        name: str,
        solve: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        event: Sequence[int],
    ) -> Tensor:
        """The mean of what ``solve`` answers to perturbed inputs, with its gradient.

        Arguments:
            name: The op's name.
            solve: Takes the inputs with one more dimension at the left of their batch shape, and
                returns it at the left.
            inputs: What is perturbed, each of shape ``batch + event``.
            event: The number of dimensions of each ``event``.
        """
        rank = max(x.dim() - dim for x, dim in zip(inputs, event, strict=True))
        perturbed, slopes = [], []
        for x, dim in zip(inputs, event, strict=True):
            x = x.reshape((1,) * (rank + dim - x.dim()) + x.shape)
            shape = (self.num_samples, *x.shape)
            noise = draw(Request(name, "normal", shape, x.dtype, x.device)).to(x.dtype)
            perturbed.append(x.detach() + self.sigma * noise)
            slope = (
                noise * (x - x.detach()) / self.sigma
            )  # zeros, with the gradient of the estimate
            slopes.append(slope.sum(tuple(range(-dim, 0))) if dim else slope)
        answers = solve(*perturbed).to(inputs[0].dtype)
        total = sum(slopes[1:], slopes[0])
        total = total.reshape(total.shape + (1,) * (answers.dim() - total.dim()))
        return answers.mean(0) + (answers * total).mean(0)


@perturb.rule(argmax)
def _(handler: perturb, name: str, scores: Tensor, **options: Any) -> Tensor:
    return handler.mean(name, lambda s: plain(argmax)(name, s), [scores], [1])


@perturb.rule(step)
def _(handler: perturb, name: str, x: Tensor, **options: Any) -> Tensor:
    return handler.mean(name, lambda s: plain(step)(name, s), [x], [0])


@perturb.rule(external)
def _(
    handler: perturb,
    name: str,
    fn: Callable[..., Any],
    *args: Any,
    event_dim: int | Sequence[int] = 0,
    **options: Any,
) -> Tensor:
    dims = [event_dim] * len(args) if isinstance(event_dim, int) else list(event_dim)
    places = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()]
    if not places:
        raise NonDiffError(
            f"perturb: op '{name}' has no argument that is a tensor of floats. Take it out of "
            "sites, or let ignore() answer for it."
        )

    def solve(*perturbed: Tensor) -> Tensor:
        given = list(args)
        for i, x in zip(places, perturbed, strict=True):
            given[i] = x
        answers: Tensor = plain(external)(name, fn, *given, event_dim=dims, **options)
        return answers

    return handler.mean(name, solve, [args[i] for i in places], [dims[i] for i in places])
