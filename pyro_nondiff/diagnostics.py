r"""The mean and the variance of a program's gradient, as its estimators give it.

Which estimator is best depends on the program. Here it is measured on the program itself:
the gradient of one step is drawn many times over, with all parameters held fixed.

Example:
    How much smaller is the variance of four samples than that of one?

    >>> from pyro_nondiff.diagnostics import gradient_statistics
    >>> from pyro_nondiff.estimators import REINFORCE, RLOO
    >>> from pyro_nondiff.infer import TraceEstimator_ELBO
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Bernoulli(0.3))
    ...     pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=x)
    >>> def guide(x):
    ...     logit = pyro.param("logit", torch.tensor(0.0))
    ...     pyro.sample("z", dist.Bernoulli(logits=logit))
    >>> def variance(estimator):
    ...     elbo = TraceEstimator_ELBO(estimator)
    ...     return gradient_statistics(elbo, model, guide, torch.tensor(1.0)).total_variance
    >>> bool(variance(RLOO(num_samples=4)) < 0.25 * variance(REINFORCE()))
    True
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .errors import NonDiffError
from .infer import TraceEstimator_ELBO
from .infer.check import preserved
from .infer.lookups import Scored, lookups

__all__ = ["GradientStatistics", "Moments", "find_lookups", "gradient_statistics"]

Program = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Moments:
    r"""The sample mean and variance of a random tensor :math:`g`, elementwise.

    Arguments:
        mean: :math:`\bar g = \frac{1}{n} \sum_i g_i`.
        variance: :math:`s^2 = \frac{1}{n-1} \sum_i (g_i - \bar g)^2`, of the same shape.
        num_samples: :math:`n`.

    Example:
        >>> from pyro_nondiff.diagnostics import Moments
        >>> moments = Moments(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]), num_samples=10**6)
        >>> print(f"{moments.signal_to_noise.item():.3f}")
        3.000
    """

    mean: Tensor
    variance: Tensor
    num_samples: int

    @property
    def total_variance(self) -> Tensor:
        """The variance summed over elements, a scalar."""
        return self.variance.sum()

    @property
    def signal_to_noise(self) -> Tensor:
        r"""The length of the mean over the standard deviation, a scalar.

        .. math:: \sqrt{\frac{\max(\lVert \bar g \rVert^2 - V / n, 0)}{V}}, \quad
                  V = \sum_j s_j^2

        :math:`V/n` is what noise adds to the squared length of a mean: without it, no
        ratio could be seen to lie below :math:`1/\sqrt n`. It is infinite for a
        gradient that does not vary, and 0 for one that is always 0.
        """
        return _signal_to_noise([self])


@dataclass(frozen=True, eq=False)
class GradientStatistics:
    """What :func:`gradient_statistics` found. ``print`` shows it as a table.

    Arguments:
        parameters: The gradient of the loss for each parameter, unconstrained, by name. Names
            are those of the param store; a parameter of a program that is an
            ``nn.Module``, and not in the store, is called ``model.<name>`` or ``guide.<name>``.
        sites: The gradient at each estimated site, for the logits of its law, by site.
        num_samples: How many gradients were drawn.
    """

    parameters: Mapping[str, Moments]
    sites: Mapping[str, Moments]
    num_samples: int

    @property
    def mean(self) -> dict[str, Tensor]:
        """The mean for each parameter, elementwise."""
        return {name: moments.mean for name, moments in self.parameters.items()}

    @property
    def variance(self) -> dict[str, Tensor]:
        """The variance for each parameter, elementwise."""
        return {name: moments.variance for name, moments in self.parameters.items()}

    @property
    def total_variance(self) -> Tensor:
        """The variance summed over all elements of all parameters, a scalar."""
        return _total(moments.variance for moments in self.parameters.values())

    @property
    def signal_to_noise(self) -> Tensor:
        """As :attr:`Moments.signal_to_noise`, of all parameters as one vector."""
        return _signal_to_noise(self.parameters.values())

    def __str__(self) -> str:
        rows = [("total", self.total_variance, self.signal_to_noise)]
        for kind, group in (("site", self.sites), ("parameter", self.parameters)):
            rows += [(f"{kind} {k}", m.total_variance, m.signal_to_noise) for k, m in group.items()]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{'gradient':{width}}    variance  signal-to-noise"]
        lines += [f"{name:{width}}  {float(v):10.4g}  {float(r):15.4g}" for name, v, r in rows]
        return "\n".join(lines)


def gradient_statistics(
    elbo: ELBO,
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 100,
    **kwargs: Any,
) -> GradientStatistics:
    r"""Draws the gradient of one step many times over, with all parameters held fixed.

    Nothing is trained. Parameters, their ``.grad``, the param store, random states, modules'
    buffers and what the estimators have learnt are afterwards as they were: a training run that
    is measured goes on as if it had not been. (Modules that are made on their first call, such
    as an autoguide's, are made.) Each draw sees what the estimators have learnt so far: measure
    after some steps, or a moving average is still at its start. Two calls in a row draw the
    same numbers.

    A site's gradient is drawn in a run of its own, so that the program runs twice a sample.

    Arguments:
        elbo: An objective with ``differentiable_loss``. Sites are measured if it is a
            :class:`pyro_nondiff.infer.TraceEstimator_ELBO` whose worlds are vectorised; their
            statistics are empty otherwise.
        model: A model.
        guide: Its guide.
        *args: Arguments of both.
        num_samples: How many gradients are drawn, 2 or more. The relative error of a variance
            is about :math:`\sqrt{2 / n}` for a normal gradient, more for one with heavy tails.
        **kwargs: Keyword arguments of both.

    Returns:
        The mean, the variance and the signal-to-noise ratio of each parameter, of each site, and
        in total.

    Raises:
        NonDiffError: If ``num_samples`` is less than 2, the objective has no
            ``differentiable_loss``, the loss depends on no parameter, or the shape of a gradient
            changes from one draw to the next.

    Example:
        >>> from pyro_nondiff.diagnostics import gradient_statistics
        >>> from pyro_nondiff.estimators import RLOO
        >>> from pyro_nondiff.infer import TraceEstimator_ELBO
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     logit = pyro.param("logit", torch.tensor(0.0))
        ...     pyro.sample("z", dist.Bernoulli(logits=logit))
        >>> elbo = TraceEstimator_ELBO(RLOO(num_samples=4))
        >>> statistics = gradient_statistics(elbo, model, guide, num_samples=200)
        >>> list(statistics.parameters), list(statistics.sites)
        (['logit'], ['z'])
        >>> statistics.mean["logit"].shape
        torch.Size([])
        >>> bool(statistics.signal_to_noise > 1)
        True
    """
    if num_samples < 2:
        raise NonDiffError(f"num_samples must be at least 2 for a variance, found {num_samples}")
    if not hasattr(elbo, "differentiable_loss"):
        raise NonDiffError(
            f"{type(elbo).__name__} has no differentiable_loss to take gradients of. Use "
            "Trace_ELBO or TraceEstimator_ELBO."
        )
    of_parameters, of_sites = _Accumulator("parameter"), _Accumulator("site")
    sites_are_seen = isinstance(elbo, TraceEstimator_ELBO)
    with _unchanged(), torch.enable_grad():
        for _ in range(num_samples):
            with _unlearnt(elbo):
                of_parameters.add(_parameter_gradients(elbo, model, guide, args, kwargs))
            if sites_are_seen:
                with _unlearnt(elbo):
                    gradients = _site_gradients(elbo, model, guide, args, kwargs)
                sites_are_seen = gradients is not None
                of_sites.add(gradients or {})
    return GradientStatistics(of_parameters.moments(), of_sites.moments(), num_samples)


def find_lookups(model: Program, guide: Program, *args: Any, **kwargs: Any) -> list[str]:
    """Finds the sites where a model gives the guide's straight-through values no gradient.

    :class:`pyro_nondiff.infer.TraceEstimator_ELBO` scores such values so that they have one, and
    warns where it cannot. Under Pyro's own objectives, ask here once before the training.

    Arguments:
        model: A model.
        guide: Its guide.
        *args: Arguments of both.
        **kwargs: Keyword arguments of both.

    Returns:
        For each such site, what is wrong and what to do. Random states and buffers are put back.

    Example:
        >>> from pyro_nondiff.diagnostics import find_lookups
        >>> from pyro_nondiff.distributions import StraightThroughOneHotCategorical
        >>> def model():
        ...     pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.7, 0.2, 0.1])))
        >>> def guide():
        ...     logits = pyro.param("logits", torch.zeros(3))
        ...     pyro.sample("z", StraightThroughOneHotCategorical(logits=logits))
        >>> [text.split(",")[0] for text in find_lookups(model, guide)]
        ["site 'z': the model's OneHotCategorical looks the straight-through value up"]
    """
    with preserved() as restore:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        restore()
    model_trace.compute_log_prob()
    found = []
    for name, site in model_trace.nodes.items():
        partner = guide_trace.nodes.get(name)
        if site["type"] == "sample" and partner is not None and not site_is_subsample(site):
            tensors: Any = (partner["value"], site["log_prob"])
            found.append(Scored(name, partner["fn"], site["fn"], *tensors))
    return lookups(found)


class _Accumulator:
    """Welford's mean and sum of squared deviations, for tensors by name.

    A name that is missing in a sample counts as zero there: a parameter or a site that one
    run of a program does not meet has no gradient in that run.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.count = 0
        self.mean: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def add(self, sample: Mapping[str, Tensor]) -> None:
        self.count += 1
        for name, value in sample.items():
            if name not in self.mean:
                dtype = torch.promote_types(value.dtype, torch.float32)
                self.mean[name] = torch.zeros_like(value, dtype=dtype)
                self.squares[name] = torch.zeros_like(value, dtype=dtype)
        for name, mean in self.mean.items():
            value = sample.get(name, torch.zeros_like(mean))
            if value.shape != mean.shape:
                raise NonDiffError(
                    f"{self.kind} '{name}': its gradient had shape {tuple(mean.shape)} and has "
                    f"{tuple(value.shape)} in another run. Give a program whose shapes are fixed."
                )
            deviation = value - mean
            mean += deviation / self.count
            self.squares[name] += deviation * (value - mean)

    def moments(self) -> dict[str, Moments]:
        count = self.count
        return {
            name: Moments(mean, self.squares[name] / (count - 1), count)
            for name, mean in self.mean.items()
        }


def _parameter_gradients(
    elbo: Any, model: Program, guide: Program, args: Any, kwargs: Any
) -> dict[str, Tensor]:
    with poutine.trace(param_only=True) as capture:
        loss = elbo.differentiable_loss(model, guide, *args, **kwargs)
    nodes: Mapping[str, Any] = capture.trace.nodes
    found = {name: site["value"].unconstrained() for name, site in nodes.items()}
    known = {id(p) for p in found.values()}
    for role, program in (("model", model), ("guide", guide)):
        if isinstance(program, nn.Module):
            own = program.named_parameters()
            found.update({f"{role}.{name}": p for name, p in own if id(p) not in known})
    states = getattr(elbo, "states", None)
    learnt = {id(p) for p in states.parameters()} if isinstance(states, nn.Module) else set()
    found = {name: p for name, p in found.items() if p.requires_grad and id(p) not in learnt}
    if not found or not loss.requires_grad:
        raise NonDiffError(
            "the loss depends on no parameter. Declare one with pyro.param or pyro.module, or give "
            "a program that is an nn.Module."
        )
    gradients = torch.autograd.grad(loss, list(found.values()), allow_unused=True)
    pairs = zip(found.items(), gradients, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


def _site_gradients(
    elbo: Any, model: Program, guide: Program, args: Any, kwargs: Any
) -> dict[str, Tensor] | None:
    try:
        found: dict[str, Tensor] = elbo.site_gradients(model, guide, *args, **kwargs)
    except NonDiffError:  # the loss could be taken, so it is that worlds ran one by one
        return None
    return found


@contextmanager
def _unchanged() -> Iterator[None]:
    """Puts back random states, buffers of modules, and the param store."""
    store = pyro.get_param_store()
    with ExitStack() as stack:
        restore = stack.enter_context(preserved())
        stack.callback(restore)
        stack.enter_context(store.scope(store.get_state()))
        yield


@contextmanager
def _unlearnt(elbo: ELBO) -> Iterator[None]:
    """Lets an objective learn on a copy: its buffers are copied, its parameters shared."""
    if not isinstance(elbo, TraceEstimator_ELBO):
        yield
        return
    states = elbo.states
    elbo.states = states.scratch()
    try:
        yield
    finally:
        elbo.states = states


def _total(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.sum() for tensor in tensors]).sum()


def _signal_to_noise(group: Iterable[Moments]) -> Tensor:
    group = list(group)
    variance = _total(moments.variance for moments in group)
    square = _total(moments.mean.square() for moments in group)
    signal = (square - variance / group[0].num_samples).clamp(min=0)
    return torch.where(signal == 0, signal, signal / variance).sqrt()
