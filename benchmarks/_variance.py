"""The variance of the encoder's gradient at one checkpoint of a VAE."""

import argparse
from collections.abc import Callable
from typing import Any, Protocol

import pyro
import torch
from _vae import VAE, vae_batch
from pyro.infer import TraceGraph_ELBO
from torch import Tensor, nn

from pyro_nondiff.estimators import RLOO, AbstractEstimator
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.infer.compiled import CompiledSVI

BATCH = 50
AVERAGE = "__baseline_avg_downstream_cost_z"

Draw = Callable[[], Tensor]


class Networks(Protocol):
    """A model and a guide, with their networks."""

    encoder: nn.Module
    decoder: nn.Module

    def model(self, x: Tensor) -> None:
        """Draw bits, then pixels."""

    def guide(self, x: Tensor) -> None:
        """Draw bits from pixels."""


def encoder_variances(
    sizes: tuple[int, ...],
    makers: dict[str, Callable[[], AbstractEstimator]],
    pyro_average: dict[str, Any],
    graph: str,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Trains a VAE, lets each estimator learn what it learns there, and draws its gradient.

    What is learnt is held constant while the variance is measured.

    Arguments:
        sizes: Of the VAE.
        makers: The library's estimators.
        pyro_average: What the site passes to Pyro for its decaying average.
        graph: What to call Pyro's TraceGraph_ELBO with that average.
        args: ``device``, ``backend``, ``train``, ``adapt`` and ``draws``.
    """
    pyro.clear_param_store()  # Pyro's average has the shape of its batch
    images, _ = vae_batch(10000, args.device)
    trained = checkpoint(sizes, images, args)
    batch = images[:BATCH]
    found = {}
    vae = VAE("variance of Pyro", pyro_average, args.device, sizes)
    vae.copy_weights(trained)
    found[graph] = variance(_pyro_draw(vae, images, batch, args.adapt), args.draws)
    for name, make in makers.items():
        vae = VAE(f"variance {name}", {}, args.device, sizes, site=f"z of variance {name}")
        vae.copy_weights(trained)
        elbo = TraceEstimator_ELBO(make())
        adapt(elbo, vae, images, args.adapt)
        found[name] = variance(encoder_gradient(elbo, vae, batch), args.draws)
    return found


def some(images: Tensor) -> Tensor:
    """A batch of them."""
    return images[torch.randint(len(images), (BATCH,), device=images.device)]


def checkpoint(sizes: tuple[int, ...], images: Tensor, args: argparse.Namespace) -> VAE:
    """A VAE after some steps of training by RLOO(4)."""
    vae = VAE("checkpoint", {}, args.device, sizes, site="z of checkpoint")
    elbo = TraceEstimator_ELBO(RLOO(4))
    optim = pyro.optim.Adam({"lr": 1e-3})
    svi = CompiledSVI(vae.model, vae.guide, optim, elbo, backend=args.backend)
    for _ in range(args.train):
        svi.step(some(images))
    return vae


def _clear(vae: Networks) -> None:
    vae.encoder.zero_grad()
    vae.decoder.zero_grad()


def adapt(elbo: TraceEstimator_ELBO, vae: Networks, images: Tensor, steps: int) -> None:
    """Trains what the estimators learn, and nothing else."""
    optimiser: torch.optim.Optimizer | None = None
    for step in range(steps):
        elbo.differentiable_loss(vae.model, vae.guide, some(images)).backward()
        if learnt := list(elbo.states.parameters()):
            optimiser = optimiser or torch.optim.Adam(learnt, lr=1e-2)
            optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
            optimiser.step()
            optimiser.zero_grad()
        _clear(vae)


def encoder_gradient(elbo: TraceEstimator_ELBO, vae: Networks, batch: Tensor) -> Draw:
    """Draws the encoder's gradient, flat; what is learnt does not move."""
    encoder = list(vae.encoder.parameters())

    def draw() -> Tensor:
        step = elbo.unreduced(vae.model, vae.guide, batch)
        grads = torch.autograd.grad(step.surrogate.mean(), encoder)
        return torch.cat([g.flatten() for g in grads])

    return draw


def _pyro_draw(vae: VAE, images: Tensor, batch: Tensor, steps: int) -> Draw:
    elbo, store = TraceGraph_ELBO(), pyro.get_param_store()
    for _ in range(steps):
        elbo.loss_and_grads(vae.model, vae.guide, some(images))
    average = store[AVERAGE].detach().clone()

    def draw() -> Tensor:
        store[AVERAGE] = average.clone()
        _clear(vae)
        elbo.loss_and_grads(vae.model, vae.guide, batch)
        grads = [p.grad for p in vae.encoder.parameters() if p.grad is not None]
        return torch.cat([g.flatten() for g in grads])

    return draw


def moments(draw: Draw, count: int) -> tuple[Tensor, Tensor]:
    """The sample mean and variance of a gradient, elementwise."""
    total = square = torch.zeros(())
    for _ in range(count):
        gradient = draw().double()
        total, square = total + gradient, square + gradient**2
    return total / count, (square - total**2 / count) / (count - 1)


def variance(draw: Draw, count: int) -> float:
    """The variance of a gradient, summed over its elements."""
    return float(moments(draw, count)[1].sum())
