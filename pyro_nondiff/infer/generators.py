"""The states of generators of random numbers, to put them back."""

from typing import Any

import numpy as np
import torch
from pyro.util import get_rng_state, set_rng_state


def random_states() -> Any:
    """The states of the global generators of torch, on all devices, of Python and of NumPy."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return get_rng_state(), cuda


def set_random_states(states: Any) -> None:
    """Puts global generators into earlier states."""
    cpu, cuda = states
    set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


def state_of(generator: Any) -> Any:
    """The state of one generator of torch, Python or NumPy."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if hasattr(generator, "getstate") else generator.get_state()


def set_state_of(generator: Any, state: Any) -> None:
    """Puts one generator into an earlier state."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif hasattr(generator, "setstate"):
        generator.setstate(state)
    else:
        generator.set_state(state)
