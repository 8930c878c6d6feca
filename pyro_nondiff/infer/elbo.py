"""The evidence lower bound, with an estimator a site."""

from copy import copy
from typing import Any, Self, cast

import torch
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from pyro.infer.util import torch_item
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ..distributions import logits
from ..errors import NonDiffError
from ..estimators import REBAR, REINFORCE, RELAX, AbstractEstimator
from ..estimators.baselines import AbstractBaseline
from ..ops._op import RANDOMIZED
from .config import check_type
from .execute import Chunk, Pair, Program
from .objective import Step, evaluate, take_step
from .plan import Plan
from .planner import Planner, Worlds
from .states import EstimatorStates, own_gradients

__all__ = [
    "TraceEstimator_ELBO",
    "TraceREBAR_ELBO",
    "TraceREINFORCE_ELBO",
    "TraceRELAX_ELBO",
]


class EstimatorELBOModule(ELBOModule):
    """A model, a guide, and what their estimators learn, as one module.

    Like lazily made Pyro parameters, what estimators learn is made on the first call:
    call the module once on data before its parameters go to an optimiser.
    """

    def __init__(self, model: Program, guide: Program, elbo: "TraceEstimator_ELBO") -> None:
        super().__init__(cast(nn.Module, model), cast(nn.Module, guide), elbo)
        self.estimators = elbo.states


class TraceEstimator_ELBO(ELBO):
    r"""The negative ELBO, with a gradient estimator chosen a site.

    .. math:: \mathcal{L} = -\mathbb{E}_{z \sim q}[\log p(x, z) - \log q(z)]

    A site's estimator is, in this order: the outermost ``config_estimator``'s, the site's
    ``infer={"estimator": ...}``, and ``estimator`` for laws without ``rsample``; laws with
    ``rsample`` are pathwise unless they are given another by name.

    Arguments:
        estimator: The estimator of every site that has no other and no ``rsample``;
            :class:`pyro_nondiff.estimators.Auto` if None.
        num_particles: The least number of base worlds; estimators may ask for more.
        max_plate_nesting: A bound on the nesting of plates; found by a run if infinite.
        vectorize_particles: ``True`` is ``worlds="vectorized"``, ``False`` is
            ``worlds="sequential"``.
        retain_graph: Whether the graph survives :meth:`loss_and_grads`.
        worlds: ``"vectorized"`` runs all worlds at once and refuses a program that does not
            broadcast; ``"sequential"`` runs them one by one, and the program's sites may
            depend on values; ``"auto"`` takes the first if the program passes, else warns
            once and takes the second.

    Raises:
        NonDiffError: For an argument that is none of these; at a step, for a site that its
            estimator cannot serve, a site without a partner, or a program that does not
            broadcast. Nothing has then been trained.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro_nondiff.estimators import RLOO
        >>> from pyro_nondiff.infer import TraceEstimator_ELBO
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     logit = pyro.param("logit", torch.tensor(0.0))
        ...     pyro.sample("z", dist.Bernoulli(logits=logit))
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceEstimator_ELBO(RLOO(4)))
        >>> for _ in range(100):
        ...     loss = svi.step(torch.tensor(2.0))
        >>> bool(pyro.param("logit") > 1)
        True
    """

    def __init__(
        self,
        estimator: AbstractEstimator | None = None,
        *,
        num_particles: int = 1,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool | None = None,
        retain_graph: bool | None = None,
        worlds: Worlds = "auto",
    ) -> None:
        if estimator is not None:
            check_type("every site", estimator)
        if num_particles < 1:
            raise NonDiffError(f"num_particles must be at least 1, found {num_particles}")
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            retain_graph=retain_graph,
        )
        self.estimator = estimator
        self.worlds = _reconcile(worlds, vectorize_particles)
        self.states = EstimatorStates()
        self._planner = Planner(num_particles, max_plate_nesting, self.worlds)

    def __call__(self, model: Program, guide: Program) -> EstimatorELBOModule:
        """The loss of a model and a guide as a module, with what the estimators learn."""
        return EstimatorELBOModule(model, guide, self)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss as a number, from ``num_particles`` base worlds."""
        with torch.no_grad():
            chunks = self._run(self._pair(model, guide, args, kwargs), estimating=False)
            return cast(float, torch_item(evaluate(chunks).mean()))

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss as a scalar tensor whose gradient is the estimators' estimate."""
        step, surrogate = self._step(model, guide, args, kwargs)
        _commit(step)
        return surrogate + (step.loss.mean() - surrogate).detach()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a detached scalar tensor; gradients are added to the parameters."""
        step, surrogate = self._step(model, guide, args, kwargs)
        self.states.register()
        if surrogate.requires_grad:
            surrogate.backward(retain_graph=self.retain_graph)
        _commit(step)
        return step.loss.mean()

    def unreduced(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Step:
        """The loss and the surrogate of each base world; nothing learnt changes."""
        pair = self._pair(model, guide, args, kwargs)
        return take_step(pair, self._run(pair))

    def vectorized(self, num_particles: int) -> Self:
        """The same objective with other base worlds, run at once; it shares what it has learnt."""
        other = copy(self)
        other.num_particles, other.worlds = num_particles, "vectorized"
        other._planner = Planner(num_particles, self.max_plate_nesting, other.worlds)
        other._planner.warned = self._planner.warned
        return other

    def plan_of(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Plan:
        """The worlds that a step runs in."""
        return self._planner.plan(self._pair(model, guide, args, kwargs))

    def site_gradients(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The estimate at each estimated site, for the logits of its law.

        Nothing learnt changes. Sites whose laws have no logits are left out.

        Returns:
            For each site, the gradient of the loss with respect to the logits, of their shape.
        """
        pair = self._pair(model, guide, args, kwargs)
        chunks = self._run(pair)
        step = take_step(pair, chunks)
        if len(chunks) > 1:
            raise NonDiffError(
                "site_gradients needs one set of logits a site, and the worlds ran one by one. "
                "Make the program broadcast."
            )
        leaves = {name: logits(site.law) for name, site in chunks[0].run.drawn.items()}
        found = {}
        for name, surrogate in step.site_surrogates.items():
            leaf = leaves[name]
            if leaf is not None and leaf.requires_grad:
                loss = surrogate.mean()
                found[name] = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
        return found

    def _pair(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Pair:
        for program in (model, guide):
            if isinstance(program, Messenger):
                raise NonDiffError(
                    f"{type(program).__name__} is a guide made of effects, which the objective "
                    "cannot run in worlds. Use a guide function, a PyroModule or an autoguide."
                )
        return Pair(model, guide, args, kwargs, self.estimator, self.states.of)

    def _run(self, pair: Pair, estimating: bool = True) -> list[Chunk]:
        """All worlds of a step, or the base worlds alone where only the loss is wanted."""
        chunks = self._planner.run(pair, estimating)
        self._look_at(chunks[0])
        return chunks

    def _step(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Step, Tensor]:
        pair = self._pair(model, guide, args, kwargs)
        chunks = self._run(pair)
        step = take_step(pair, chunks)
        surrogate = step.surrogate.mean()
        if (own := own_gradients(step.own_losses, self.states)) is not None:
            surrogate = surrogate + own
        for local, other in step.joined:
            self._planner.warn(
                f"site '{local}' lies in a plate that the later guide site '{other}' is outside "
                "of, so the costs of all plate elements are summed for each: its gradient is "
                "unbiased, but varies more. Draw global sites before local ones in the guide."
            )
        for owner, other in step.left_out:
            self._planner.warn(
                f"site '{other}' cannot be relaxed, so the terms that can depend on it are left "
                f"out of the control variate of site '{owner}': unbiased, but less correlated. "
                "Draw a OneHotCategorical in place of an indexed Categorical."
            )
        return step, surrogate

    def _look_at(self, chunk: Chunk) -> None:
        """Says what a user may not know of the sites of a run."""
        for site in chunk.run.own.values():
            if not (site.auxiliary or site.infer.get(RANDOMIZED)):
                self._planner.warn(
                    f"site '{site.name}' is latent in the model, and the guide does not draw it: "
                    "it is drawn from the model's own law and adds no KL, so nothing is inferred "
                    'of it. Draw it in the guide, or say infer={"is_auxiliary": True} if it is '
                    "meant."
                )

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("worlds are run by the planner, not traced one by one")


class TraceREINFORCE_ELBO(TraceEstimator_ELBO):
    """:class:`TraceEstimator_ELBO` with REINFORCE at every site without ``rsample``.

    Arguments:
        baseline: The baseline of every such site, see
            :class:`pyro_nondiff.estimators.REINFORCE`.
        **options: As for :class:`TraceEstimator_ELBO`.

    Example:
        >>> from pyro_nondiff.estimators import MovingAverage
        >>> from pyro_nondiff.infer import TraceREINFORCE_ELBO
        >>> TraceREINFORCE_ELBO(MovingAverage(decay=0.99)).estimator
        REINFORCE(baseline=MovingAverage(decay=0.99, per_element=False))
    """

    def __init__(self, baseline: AbstractBaseline | None = None, **options: Any) -> None:
        super().__init__(REINFORCE(baseline), **options)


class TraceREBAR_ELBO(TraceEstimator_ELBO):
    """:class:`TraceEstimator_ELBO` with REBAR at every site without ``rsample``.

    Arguments:
        temperature: As for :class:`pyro_nondiff.estimators.REBAR`.
        eta: As for :class:`pyro_nondiff.estimators.REBAR`.
        **options: As for :class:`TraceEstimator_ELBO`.

    Example:
        >>> from pyro_nondiff.infer import TraceREBAR_ELBO
        >>> TraceREBAR_ELBO(temperature=0.1).estimator.temperature
        0.1
    """

    def __init__(self, temperature: float = 0.5, eta: float = 1.0, **options: Any) -> None:
        super().__init__(REBAR(temperature, eta), **options)


class TraceRELAX_ELBO(TraceEstimator_ELBO):
    """:class:`TraceEstimator_ELBO` with RELAX at every site without ``rsample``.

    Arguments:
        temperature: As for :class:`pyro_nondiff.estimators.RELAX`.
        **options: As for :class:`TraceEstimator_ELBO`. For a network of your own give
            ``TraceEstimator_ELBO(RELAX(net))``, or choose it a site.

    Example:
        >>> from pyro_nondiff.infer import TraceRELAX_ELBO
        >>> TraceRELAX_ELBO(num_particles=2).num_particles
        2
    """

    def __init__(self, temperature: float = 0.5, **options: Any) -> None:
        super().__init__(RELAX(temperature=temperature), **options)


def _reconcile(worlds: Worlds, vectorize_particles: bool | None) -> Worlds:
    if worlds not in ("auto", "vectorized", "sequential"):
        raise NonDiffError(f"worlds must be 'auto', 'vectorized' or 'sequential', found {worlds!r}")
    if vectorize_particles is None:
        return worlds
    meant: Worlds = "vectorized" if vectorize_particles else "sequential"
    if worlds not in ("auto", meant):
        raise NonDiffError(
            f"vectorize_particles={vectorize_particles} means worlds={meant!r}, but worlds="
            f"{worlds!r} was given too. Give one of them."
        )
    return meant


def _commit(step: Step) -> None:
    for update in step.updates:
        update()
