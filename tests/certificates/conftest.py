"""What holds for all certificates."""

import pytest
import torch


@pytest.fixture(autouse=True)
def certificate(param_store: object) -> None:
    """Certificates are for float64, and their programs keep parameters in Pyro's store."""
    if torch.get_default_dtype() != torch.float64:
        pytest.skip("an exact expectation is compared in float64")
