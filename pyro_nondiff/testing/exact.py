"""The exact gradient of a model and a guide, by enumeration and quadrature.

Nothing of the engine is used: each joint value of the guide's sites is given to guide and
model under Pyro's own trace, and the objective is their sum.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

from ..distributions import (
    core,
    describe,
    log_prob,
    noise_concentration,
    noise_kind,
    noise_shape,
    transport,
)
from ..errors import NonDiffError
from ..noise import Request
from .source import CONTINUOUS, Enumeration
from .walk import Walk, outcomes

__all__ = ["exact_gradient", "exact_loss", "parameters_of"]

Program = Callable[..., Any]


def exact_loss(
    model: Program, guide: Program, *args: Any, nodes: int = 12, **kwargs: Any
) -> Tensor:
    r"""The negative ELBO, exactly, as a differentiable scalar.

    .. math:: -\sum_z q(z) [\log p(x, z) - \log q(z)]

    A site that the model alone has is summed over under its own law, and adds no term.

    over all joint values of the guide's discrete sites, by Gauss's quadrature over the noise of
    its continuous ones. Scales and masks act as they do in Pyro.

    Arguments:
        model: A model.
        guide: Its guide, of discrete sites and continuous maps of noise.
        *args: Arguments of both.
        nodes: The number of quadrature nodes of each continuous number.
        **kwargs: Keyword arguments of both.

    Raises:
        NonDiffError: At a site of another law.

    Example:
        >>> from pyro_nondiff.testing import exact_loss
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        >>> print(f"{abs(exact_loss(model, guide).item()):.6f}")
        0.000000
    """
    pieces = list(_pieces(model, guide, args, kwargs, nodes))
    return torch.stack(pieces).sum()


def exact_gradient(
    model: Program, guide: Program, *args: Any, nodes: int = 12, **kwargs: Any
) -> dict[str, Tensor]:
    """The gradient of :func:`exact_loss`, for each parameter by name.

    Parameters are those of Pyro's param store, unconstrained, and those of ``model`` and
    ``guide`` where these are modules.
    """
    for _ in _pieces(model, guide, args, kwargs, nodes):
        break  # parameters are made on the first run
    parameters = parameters_of(model, guide)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for piece in _pieces(model, guide, args, kwargs, nodes):
        for name, gradient in gradients_of(piece, parameters).items():
            total[name] += gradient
    return total


def parameters_of(*programs: Program) -> dict[str, Tensor]:
    """The parameters of the param store, and of programs that are modules, by name."""
    found: dict[str, Tensor] = dict(pyro.get_param_store().named_parameters())
    known = {id(p) for p in found.values()}
    for program in programs:
        if isinstance(program, nn.Module):
            own = program.named_parameters()
            found.update({name: p for name, p in own if id(p) not in known})
    return found


def gradients_of(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of a scalar for each parameter, zero where it has none."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), gradients, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


def _pieces(model: Program, guide: Program, args: Any, kwargs: Any, nodes: int) -> Iterator[Tensor]:
    """The summands of the loss, one for each outcome."""
    for walk in outcomes():
        outcome = _Outcome(walk, nodes)
        with outcome:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            replayed = poutine.replay(model, trace=guide_trace)
            model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        for name in set(model_trace.nodes) - set(guide_trace.nodes):
            site = model_trace.nodes[name]
            if site["type"] == "sample" and not site["is_observed"]:
                model_trace.remove_node(name)  # the model's own sites add no term
        traces = [prune_subsample_sites(trace) for trace in (model_trace, guide_trace)]
        yield -outcome.probability * (traces[0].log_prob_sum() - traces[1].log_prob_sum())


class _Outcome(Messenger):
    """Gives each latent site that has no value the one that a walk chooses."""

    def __init__(self, walk: Walk, nodes: int) -> None:
        super().__init__()
        self.walk = walk
        self.nodes = nodes
        self.probability: Tensor = torch.ones(())

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["value"] is not None or msg["is_observed"]:
            return
        law = msg["fn"]
        base = core(law)
        if isinstance(base, Bernoulli | Categorical | OneHotCategorical):
            value = self._discrete(base).reshape(law.shape())
            self.probability = self.probability * log_prob(law, value)[0].sum().exp()
        elif (kind := noise_kind(law)) in CONTINUOUS:
            before = self.walk.probability
            shape, place = tuple(noise_shape(law)), (torch.float64, "cpu")
            request = Request(msg["name"], kind, shape, *place, "u", law, noise_concentration(law))
            value = transport(law, Enumeration(self.walk, self.nodes)(request))
            self.probability = self.probability * (self.walk.probability / before)
        elif isinstance(base, pyro.distributions.Delta):
            value = law.rsample()
        else:
            raise NonDiffError(
                f"site '{msg['name']}': {describe(law)} can be neither enumerated nor integrated. "
                "Exact gradients serve Bernoulli, Categorical, OneHotCategorical, Normal, "
                "Exponential and ScaleGamma laws."
            )
        msg["value"], msg["done"] = value, True

    def _discrete(self, base: Any) -> Tensor:
        """A joint value of all elements; all are possible, their probability counted above."""
        if isinstance(base, Bernoulli):
            chosen = [self.walk.choose([0.5, 0.5]) for _ in range(base.batch_shape.numel())]
            return torch.tensor(chosen, dtype=base.logits.dtype)
        size = base.logits.shape[-1]
        even = [1 / size] * size
        index = torch.tensor([self.walk.choose(even) for _ in range(base.batch_shape.numel())])
        if isinstance(base, OneHotCategorical):
            return torch.nn.functional.one_hot(index, size).to(base.logits.dtype)
        return index
