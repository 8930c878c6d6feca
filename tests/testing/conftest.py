"""What holds for all oracles."""

import pytest
import torch


@pytest.fixture(autouse=True)
def float64() -> None:
    """Oracles are compared with closed forms to the digits of float64."""
    if torch.get_default_dtype() != torch.float64:
        pytest.skip("an exact expectation is compared in float64")
