"""A module made to broadcast: against a loop over its rows, and in the worlds of an estimator."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_nondiff.errors import NonDiffError
from pyro_nondiff.estimators import Enumerate
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.nn import batchify

BATCHES = [(), (3,), (2, 3), (2, 1, 3), (0, 3)]


@pytest.mark.parametrize("batch", BATCHES)
def test_each_row_is_the_modules_own(batch: tuple[int, ...]) -> None:
    module = nn.Conv2d(2, 4, 3)
    images = torch.randn(*batch, 2, 5, 6)
    found = batchify(module, 3)(images)
    assert found.shape == (*batch, 4, 3, 4)
    rows = zip(images.reshape(-1, 2, 5, 6), found.reshape(-1, 4, 3, 4), strict=True)
    for image, row in rows:
        torch.testing.assert_close(row, module(image))


def test_arguments_broadcast_and_results_keep_their_structure() -> None:
    lstm = nn.LSTM(3, 5, num_layers=2, batch_first=True)
    words, memory = torch.randn(4, 1, 6, 3), torch.randn(3, 2, 5)

    class Starts(nn.Module):
        """A tuple is no tensor: the state is given as two arguments."""

        def forward(self, x: Tensor, state: Tensor) -> Any:
            return lstm(x, (state, 2 * state))

    read = batchify(Starts(), event_dim=(2, 2), in_dims=(0, 1), out_dims=(0, 1, 1))
    states, (hidden, cell) = read(words, memory)
    assert states.shape == (4, 3, 6, 5)
    assert hidden.shape == cell.shape == (4, 3, 2, 5)
    for i in range(4):
        for j in range(3):
            own = lstm(words[i, 0], (memory[j], 2 * memory[j]))
            torch.testing.assert_close((states[i, j], (hidden[i, j], cell[i, j])), own)


def test_what_is_no_tensor_is_passed_on() -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor, word: str, *, factor: float) -> Any:
            return {"scaled": factor * x, "word": word}

    found = batchify(Scale(), 1)(torch.ones(2, 3, 4), "kept", factor=2.0)
    torch.testing.assert_close(found["scaled"], torch.full((2, 3, 4), 2.0))
    assert found["word"] == "kept"


def test_faults_are_named() -> None:
    conv, gru = nn.Conv2d(1, 2, 3), nn.GRU(3, 6, batch_first=True)
    with pytest.raises(NonDiffError, match=r"Conv2d\): event_dim is 3, found .*\(5, 5\)"):
        batchify(conv, 3)(torch.zeros(5, 5))
    with pytest.raises(NonDiffError, match="event_dim has 2 numbers, found 1 arguments"):
        batchify(conv, (3, 1))(torch.zeros(1, 5, 5))
    with pytest.raises(NonDiffError, match="out_dims has 1 numbers, found 2 returned"):
        batchify(gru, 2, out_dims=(0,))(torch.zeros(4, 7, 3))
    with pytest.raises(NonDiffError, match=r"dimension 0 .* found .*\(1, 4, 6\) for 4 rows"):
        batchify(gru, 2)(torch.zeros(4, 7, 3))
    with pytest.raises(NonDiffError, match=r"do not broadcast, found \(2,\) and \(3,\)"):
        batchify(nn.Bilinear(1, 1, 1), 1)(torch.zeros(2, 1), torch.zeros(3, 1))


class Program:
    """Chooses a picture for each of three, and explains it by what a network sees in it."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.pictures = torch.randn(4, 1, 5, 5)

    def model(self) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(4)))
            image = torch.einsum("...k,kcij->...cij", z, self.pictures)
            seen = self.network(image).flatten(-3)
            pyro.sample("x", dist.Normal(seen, 1.0).to_event(1), obs=torch.zeros(3, 18))

    def guide(self) -> None:
        logits = pyro.param("logits", torch.zeros(3, 4))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.OneHotCategorical(logits=logits))

    def gradient(self, worlds: Any) -> Tensor:
        """The exact gradient: it does not depend on what is drawn."""
        pyro.clear_param_store()
        elbo = TraceEstimator_ELBO(Enumerate(), worlds=worlds)
        elbo.loss_and_grads(self.model, self.guide)
        gradient = pyro.param("logits").unconstrained().grad
        assert gradient is not None
        return gradient


@pytest.mark.usefixtures("param_store")
def test_worlds_run_at_once() -> None:
    bare = nn.Conv2d(1, 2, 3)
    with pytest.raises(Exception, match="conv2d"):
        Program(bare).gradient("vectorized")
    program = Program(batchify(bare, 3))
    torch.testing.assert_close(program.gradient("vectorized"), program.gradient("sequential"))


@pytest.mark.usefixtures("param_store")
def test_rows_that_are_not_treated_alone_are_found() -> None:
    mixed = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    program = Program(batchify(mixed, 3))
    with pytest.raises(NonDiffError, match="world"):
        program.gradient("vectorized")
    mixed.eval()
    torch.testing.assert_close(program.gradient("vectorized"), program.gradient("sequential"))
