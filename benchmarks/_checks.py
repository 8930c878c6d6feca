"""What the benchmarks check before they time: that a recorded step does what the eager one does."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.optim import SGD
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_nondiff.infer.compiled import CompiledSVI

Program = Callable[..., Any]
Make = Callable[[], tuple[Program, Program, ELBO]]

CLOSE = 1e-4

_aten = torch.ops.aten
_WAITING = {
    _aten._local_scalar_dense.default,
    _aten.item.default,
    _aten.is_nonzero.default,
    _aten.nonzero.default,
    _aten.equal.default,
    _aten.masked_select.default,
}


def require(met: bool, otherwise: str) -> None:
    """Stops the benchmark where a check fails, also under ``python -O``."""
    if not met:
        raise AssertionError(otherwise)


class NoWaiting(TorchDispatchMode):
    """Refuses operations that wait for numbers of a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        require(func not in _WAITING, f"the step waits for a number: {func}")
        return func(*args, **(kwargs or {}))


def check_waiting(make: Make, args: tuple[Any, ...]) -> str:
    """That a step which waits is seen: Pyro's own, which returns a Python number.

    Arguments:
        make: Makes a model, a guide and an objective, which is not used.
        args: What the programs take.

    Raises:
        AssertionError: If it is not.
    """
    model, guide, _ = make()
    svi = SVI(model, guide, SGD({"lr": 1e-3}), Trace_ELBO())
    try:
        with NoWaiting():
            svi.step(*args)
    except AssertionError:
        return "Pyro's step waits for a number, and is seen to"
    raise AssertionError("Pyro's step waits for a number, and is not seen to")


def check_recorded(make: Make, args: tuple[Any, ...], steps: int = 4) -> str:
    """Compares a replayed step with the eager one, and returns what was found.

    The optimiser is plain gradient descent, whose moves are the gradients.

    Arguments:
        make: Makes a model, a guide and an objective, the same ones each time.
        args: What the programs take.
        steps: How many steps are compared; from the second on they are recorded.

    Raises:
        AssertionError: If losses or gradients differ, if the step is recorded more or less than
            once, or waits for a number.
    """
    eager = _training(make, args, steps, SVI)
    compiled: list[CompiledSVI] = []

    def replayed(*parts: Any) -> CompiledSVI:
        compiled.append(CompiledSVI(*parts, backend="replay"))
        return compiled[0]

    found = _training(make, args, steps, replayed)
    assert_close(found[0], eager[0], rtol=CLOSE, atol=1e-5)
    pairs = zip(found[1], eager[1], strict=True)
    worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    require(worst < CLOSE, f"replayed and eager gradients differ by {worst:.1e}")
    recordings = compiled[0].num_recordings
    require(recordings == 1, f"expected 1 recording, found {recordings}")
    with NoWaiting():
        compiled[0].step(*args)
    return f"replayed gradients as eager ones to {worst:.0e}, 1 recording, no waiting"


def _training(
    make: Make, args: tuple[Any, ...], steps: int, kind: Callable[..., Any]
) -> tuple[Tensor, list[Tensor]]:
    """Losses, and the moves of all parameters at each step but the first, where some are made."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = kind(*_with_optimiser(make()))
    losses, places = [], []
    for step in range(steps):
        pyro.set_rng_seed(step)
        losses.append(torch.as_tensor(svi.step(*args)).detach().cpu())
        values = [pyro.get_param_store()[name] for name in sorted(pyro.get_param_store())]
        places.append(torch.cat([value.detach().flatten().cpu() for value in values]))
    moves = [after - before for before, after in pairwise(places)]
    return torch.stack(losses).float(), moves


def _with_optimiser(parts: tuple[Program, Program, ELBO]) -> tuple[Any, ...]:
    model, guide, objective = parts
    return model, guide, SGD({"lr": 1e-3}), objective
