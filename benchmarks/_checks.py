"""What the benchmarks check before they time: that a recorded step does what the eager one does."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, SVI
from pyro.optim import SGD
from torch import Tensor
from torch.testing import assert_close

from pyro_nondiff.infer.compiled import CompiledSVI

Program = Callable[..., Any]
Make = Callable[[], tuple[Program, Program, ELBO]]


def check_recorded(make: Make, args: tuple[Any, ...], steps: int = 4) -> None:
    """Compares a replayed step with the eager one: losses, gradients, number of recordings.

    The optimiser is plain gradient descent, whose moves are the gradients.

    Arguments:
        make: Makes a model, a guide and an objective, the same ones each time.
        args: What the programs take.
        steps: How many steps are compared; from the second on they are recorded.

    Raises:
        AssertionError: If they differ.
    """
    eager = _training(make, args, steps, lambda *parts: SVI(*parts).step)
    compiled: list[CompiledSVI] = []

    def replayed(*parts: Any) -> Program:
        compiled.append(CompiledSVI(*parts, backend="replay"))
        return compiled[0].step

    found = _training(make, args, steps, replayed)
    assert_close(found, eager, rtol=1e-4, atol=1e-5)
    recordings = compiled[0].num_recordings
    if recordings != 1:
        raise AssertionError(f"expected 1 recording, found {recordings}")


def _training(
    make: Make, args: tuple[Any, ...], steps: int, stepper: Callable[..., Program]
) -> dict[str, Tensor]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, objective = make()
    step = stepper(model, guide, SGD({"lr": 1e-3}), objective)
    losses = [torch.as_tensor(step(*args)).detach().cpu() for _ in range(steps)]
    store = pyro.get_param_store()
    found = {name: store[name].detach().cpu().clone() for name in store}
    pyro.clear_param_store()
    return {"loss": torch.stack(losses).float(), **found}
