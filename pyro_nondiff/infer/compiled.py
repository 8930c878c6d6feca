"""Variational inference whose step is recorded once, and compiled."""

from typing import Any, get_args

from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor, zeros_like

from ..errors import NonDiffError
from ._backends import Backend
from ._fused import FusedOptimizer
from ._variants import Routine
from .execute import Program

__all__ = ["CompiledSVI"]


class CompiledSVI:
    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: PyroOptim,
        loss: ELBO,
        *,
        backend: Backend = "inductor",
    ) -> None:
        if backend not in get_args(Backend):
            raise NonDiffError(
                f"backend must be 'inductor', 'replay' or 'eager', found {backend!r}"
            )
        if not isinstance(loss, ELBO):
            raise NonDiffError(
                f"loss must be an ELBO, such as TraceEstimator_ELBO(), found {type(loss).__name__}"
            )
        self.model = model
        self.guide = guide
        self.optim = optim
        self.loss = loss
        self.backend = backend
        programs = [model, guide, loss]
        self._optimizer = FusedOptimizer(optim)
        self._step = Routine(self._loss_and_grads, programs, backend)
        self._evaluate = Routine(self._loss, programs, backend)
        self._moved: set[Tensor] = set()

    @property
    def num_recordings(self) -> int:
        """How many steps and evaluations have been recorded."""
        return self._step.num_recordings + self._evaluate.num_recordings

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes one step of training."""
        loss, parameters = self._step(args, kwargs)
        for parameter in parameters:
            if parameter.grad is None and parameter in self._moved:
                parameter.grad = zeros_like(parameter)  # as Pyro: momentum goes on
        self._optimizer.step(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                self._moved.add(parameter)
                parameter.grad = None
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """An estimate of the loss, which changes no parameter."""
        return self._evaluate(args, kwargs).loss

    def _loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        return self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)

    def _loss(self, *args: Any, **kwargs: Any) -> Any:
        return self.loss.loss(self.model, self.guide, *args, **kwargs)
