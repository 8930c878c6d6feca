"""Variational inference whose step is recorded once, and compiled."""

from typing import Any, cast, get_args

from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from ..errors import NonDiffError
from .capture.backends import Backend
from .capture.fused import FusedOptimizer
from .capture.routine import Routine
from .execute import Program

__all__ = ["CompiledSVI"]


class CompiledSVI:
    """:class:`pyro.infer.SVI` with a step that is recorded once, and compiled.

    The first step with arguments of new shapes runs as in Pyro, validated if validation is on. The
    second one is recorded, with no validation, as one graph of tensor operations, forward and
    backward. It runs beside the step once, and if both do the same, inductor compiles it; from
    then on no Python of the program runs. Draws are those of an eager step under the same seed.
    Parameters, state of the optimiser and of estimators stay where they are in Pyro, so that either
    kind of SVI goes on with what the other has saved.

    A graph takes all that changes between steps as it is then: arguments, parameters, buffers,
    temperatures, and any tensor that the program reaches. Numbers, words and functions are
    constants of it. They are watched, in arguments, attributes, closures, globals, and lists and
    dictionaries of them: with another value, another graph is recorded. What changes at each step
    should be a tensor. Not seen are changes *inside* NumPy arrays, containers of more than 64
    things, and objects of other libraries.

    A step that is no fixed list of tensor operations runs eager, with one
    :class:`~pyro_nondiff.errors.NonDiffWarning` that says why: it branches on the value of a
    sample, or changes a number that it keeps. :func:`~pyro_nondiff.ops.external` ops are called at
    each step, between what is compiled before and after them.

    Arguments:
        model: The model.
        guide: The guide.
        optim: An optimiser of ``pyro.optim``, with any options, clipping or scheduler. All
            parameters with equal options are moved by one torch optimiser, fused where it can be.
        loss: An objective of this library; or Pyro's ``Trace_ELBO``, ``TraceMeanField_ELBO`` or
            ``TraceEnum_ELBO``, where they can be recorded.
        backend: ``"inductor"`` compiles the graph, which takes seconds, once for each graph and
            machine: torch caches it on disk. ``"replay"`` runs its operations one by one.
            ``"eager"`` records nothing.

    Raises:
        NonDiffError: For an optimiser or objective that it cannot serve, and as the objective does.
            Nothing has then been trained.

    Example:
        >>> from pyro_nondiff.estimators import RLOO
        >>> from pyro_nondiff.infer import CompiledSVI, TraceEstimator_ELBO
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     logit = pyro.param("logit", torch.tensor(0.0))
        ...     pyro.sample("z", dist.Bernoulli(logits=logit))
        >>> optim, elbo = pyro.optim.Adam({"lr": 0.1}), TraceEstimator_ELBO(RLOO(4))
        >>> svi = CompiledSVI(model, guide, optim, elbo, backend="replay")
        >>> for _ in range(100):
        ...     loss = svi.step(torch.tensor(2.0))
        >>> svi.num_recordings, loss.shape
        (1, torch.Size([]))
        >>> bool(pyro.param("logit") > 1)
        True
    """

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
        self._optimizer = FusedOptimizer(optim)
        programs = [model, guide, loss]
        self._step = Routine("the step", self._loss_and_grads, programs, backend)
        self._evaluation = Routine("evaluate_loss", self._loss, programs, backend)

    @property
    def num_recordings(self) -> int:
        """How many steps and evaluations have been recorded."""
        return self._step.num_recordings + self._evaluation.num_recordings

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes one step of training.

        Returns:
            The loss, a scalar tensor. Nothing waits for its value until you read it.
        """
        loss, parameters = self._step(args, kwargs)
        self._optimizer.step(parameters)
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """An estimate of the loss, a scalar tensor. No parameter changes."""
        return self._evaluation(args, kwargs).loss

    def _loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        return cast(Any, self.loss).loss_and_grads(self.model, self.guide, *args, **kwargs)

    def _loss(self, *args: Any, **kwargs: Any) -> Any:
        return cast(Any, self.loss).loss(self.model, self.guide, *args, **kwargs)
