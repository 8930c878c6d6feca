"""Who chooses the estimator of a site."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import nn

from ..distributions import Law
from ..errors import NonDiffError
from ..estimators import AbstractEstimator, Auto, Pathwise

KEY = "estimator"
"""The entry of a site's ``infer`` dictionary that chooses its estimator."""


class EstimatorConfig(Messenger):
    """Writes the chosen estimators into the ``infer`` entries of the sites it is around."""

    def __init__(self, estimators: Mapping[str, AbstractEstimator]) -> None:
        super().__init__()
        for name, estimator in estimators.items():
            check_type(name, estimator)
        self.estimators = dict(estimators)
        self._met: set[str] = set()

    def __enter__(self) -> Any:
        self._met = set()
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        name = msg["name"]
        self._met.add(name)
        if name in self.estimators:
            msg["infer"] = {**msg["infer"], KEY: self.estimators[name]}

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> Any:
        unknown = sorted(self.estimators.keys() - self._met)
        result = super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None and unknown:
            raise NonDiffError(
                f"config_estimator names {unknown}, but the program's sites are "
                f"{sorted(self._met)}. Correct the name; for a site that not every run "
                'meets, give infer={"estimator": ...} at the site itself.'
            )
        return result


class _ConfiguredModule(nn.Module):
    """A module run under a config, so that its parameters stay visible."""

    def __init__(self, module: nn.Module, config: EstimatorConfig) -> None:
        super().__init__()
        self.module = module
        self._config = config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._config:
            return self.module(*args, **kwargs)


def config_estimator(
    fn: Callable[..., Any], estimators: Mapping[str, AbstractEstimator]
) -> Callable[..., Any]:
    """Chooses the estimators of a program's sites from outside.

    The outermost choice wins: over an inner ``config_estimator``, over the site's own
    ``infer={"estimator": ...}``, and over the objective's.

    Arguments:
        fn: A guide. A module comes back as a module with the same parameters.
        estimators: An estimator for each site name.

    Raises:
        NonDiffError: If a value is no estimator, or, when the program runs, if it has no
            site of that name.

    Example:
        >>> from pyro_nondiff.infer import config_estimator
        >>> from pyro_nondiff.estimators import DisARM
        >>> def guide():
        ...     return pyro.sample("z", dist.Bernoulli(logits=torch.zeros(())))
        >>> guide = config_estimator(guide, {"z": DisARM()})
        >>> trace = pyro.poutine.trace(guide).get_trace()
        >>> trace.nodes["z"]["infer"]["estimator"]
        DisARM()
    """
    config = EstimatorConfig(estimators)
    if isinstance(fn, nn.Module):
        return _ConfiguredModule(fn, config)

    def configured(*args: Any, **kwargs: Any) -> Any:
        with config:
            return fn(*args, **kwargs)

    return configured


def check_type(site: str, estimator: object) -> None:
    """Refuses what is no estimator, by the site's name."""
    if not isinstance(estimator, AbstractEstimator):
        raise NonDiffError(
            f"site '{site}': the estimator must be an object such as RLOO(num_samples=4), "
            f"found {estimator!r}."
        )


def choose(
    site: str, law: Law, infer: Mapping[str, Any], default: AbstractEstimator | None
) -> AbstractEstimator:
    """The estimator that serves a site, refused here if it cannot serve the law.

    The objective's default leaves laws with ``rsample`` pathwise: only a choice made at
    the site or by ``config_estimator`` takes their gradient away.
    """
    if KEY in infer:
        estimator = infer[KEY]
        check_type(site, estimator)
    elif law.has_rsample:
        estimator = Pathwise()
    else:
        estimator = Auto() if default is None else default
    estimator = cast(AbstractEstimator, estimator).specialise(law)
    if (reason := estimator.refuse(law)) is not None:
        raise NonDiffError(f"site '{site}': {reason}")
    return estimator
