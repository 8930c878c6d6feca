"""What holds for all certificates."""

import pytest
import torch

from pyro_nondiff.infer import planner


@pytest.fixture(autouse=True)
def certificate(param_store: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates are for float64, and their programs keep parameters in Pyro's store.

    The world check takes up to 16 draws of so small programs, which costs more than a
    certificate. It has tests of its own; here one draw must do.
    """
    if torch.get_default_dtype() != torch.float64:
        pytest.skip("an exact expectation is compared in float64")
    monkeypatch.setattr(planner, "_draws", lambda chunk: 1)
