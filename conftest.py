"""Doctests: every docstring starts from the same seed, and leaves nothing behind.

This file is not in the package, so that no wheel ships it.
"""

from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

# The package is imported whole before pytest imports its modules one by one, or a module whose
# package has not been imported yet would be executed twice.
import pyro_nondiff  # noqa: F401


@pytest.fixture(autouse=True, scope="session")
def doctest_names(doctest_namespace: dict[str, Any]) -> None:
    """The names that a docstring may use without importing them."""
    doctest_namespace.update(torch=torch, pyro=pyro, dist=dist)


@pytest.fixture(autouse=True)
def doctest_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed torch, and use its own default dtype, as in a fresh interpreter."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        pyro.clear_param_store()
        yield
        pyro.clear_param_store()
        torch.set_default_dtype(dtype)
