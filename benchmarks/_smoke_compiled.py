"""What is exact about a recorded step: no time is measured here."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from _hand_checks import require
from _vae import VAE
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import SGD
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_nondiff.estimators import AbstractEstimator
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.infer.capture.backends import Backend
from pyro_nondiff.infer.compiled import CompiledSVI

SIZES = (12, 9, 8)
BATCH = 10
STEPS = 4
CLOSE = 1e-4

_aten = torch.ops.aten
WAITING = {
    _aten._local_scalar_dense.default,
    _aten.item.default,
    _aten.is_nonzero.default,
    _aten.nonzero.default,
    _aten.equal.default,
    _aten.masked_select.default,
}


class NoWaiting(TorchDispatchMode):
    """Refuses operations that wait for numbers of a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        require(func not in WAITING, f"the step waits for a number: {func}")
        return func(*args, **(kwargs or {}))


class Ours:
    """A tiny VAE with the library's step.

    Arguments:
        name: Of its site and parameters.
        estimator: The estimator.
        backend: Of the step.
        device: Where it runs.
    """

    def __init__(
        self, name: str, estimator: AbstractEstimator, backend: Backend, device: str
    ) -> None:
        torch.manual_seed(0)
        self.vae = VAE(name, {}, device, SIZES, site=f"z of {name}")
        self.elbo = TraceEstimator_ELBO(estimator)
        options = SGD({"lr": 0.01})
        self.svi = CompiledSVI(self.vae.model, self.vae.guide, options, self.elbo, backend=backend)

    def parameters(self) -> Tensor:
        """All that is trained, flat."""
        parts = (self.vae.encoder, self.vae.decoder, self.elbo.states)
        return torch.cat([p.detach().flatten() for part in parts for p in part.parameters()])


def check_waiting(device: str) -> str:
    """That a step which waits is seen: Pyro's own, which returns a Python number.

    Raises:
        AssertionError: If it is not.
    """
    vae = VAE("waiting", {}, device, SIZES, site="z of waiting")
    svi = SVI(vae.model, vae.guide, SGD({"lr": 0.01}), Trace_ELBO())
    x = torch.zeros(BATCH, SIZES[0], device=device)
    try:
        with NoWaiting():
            svi.step(x)
    except AssertionError:
        return "Pyro's step waits for a number, and is seen to"
    raise AssertionError("Pyro's step waits for a number, and is not seen to")


def check_step(name: str, make: Callable[[], AbstractEstimator], device: str) -> str:
    """Compares a replayed step with the eager one, and returns a line.

    With SGD a difference of parameters is a gradient times the learning rate.

    Raises:
        AssertionError: If gradients differ, the step is recorded more or less than once, or waits
            for a number.
    """
    x = torch.rand(BATCH, SIZES[0], device=device).round()
    eager = Ours(f"eager {name}", make(), "eager", device)
    replayed = Ours(f"replayed {name}", make(), "replay", device)
    worst = 0.0
    for step in range(STEPS):
        moves = []
        for each in (eager, replayed):
            before = each.parameters() if step else None
            pyro.set_rng_seed(step)
            each.svi.step(x)
            if before is not None:  # what is learnt is made on the first step
                moves.append(each.parameters() - before)
        if moves:
            worst = max(worst, float((moves[0] - moves[1]).norm() / moves[0].norm()))
    require(worst < CLOSE, f"{name}: replayed and eager gradients differ by {worst:.1e}")
    count = replayed.svi.num_recordings
    require(count == 1, f"{name}: recorded {count} times")
    with NoWaiting():
        replayed.svi.step(x)
    return f"{name}: replayed gradients as eager ones to {worst:.0e}, 1 recording, no waiting"
