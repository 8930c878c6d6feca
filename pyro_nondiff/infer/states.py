"""What the estimators of an objective learn, kept by site name."""

from copy import deepcopy
from typing import Any, cast

import pyro
import torch
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

from ..distributions import Law
from ..errors import NonDiffError
from ..estimators import AbstractEstimator


class EstimatorStates(nn.Module):
    """The learnt state of each site, made on its first step.

    A ``state_dict`` that is loaded before a site's first step waits for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._recipes: dict[str, AbstractEstimator] = {}
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._trained: dict[str, nn.Module] = {}

    def of(self, name: str, estimator: AbstractEstimator, law: Law) -> nn.Module | None:
        """The state of a site, made now if this is its first step."""
        known = self._recipes.setdefault(name, estimator)
        if known != estimator:
            raise NonDiffError(
                f"site '{name}': its estimator was {known!r} and is {estimator!r} at this step. "
                "Give the same estimator, with the same modules, at every step; make modules "
                "once, outside the program."
            )
        key = _key(name)
        if key not in self._modules:
            self._modules[key] = self._made(key, estimator, law)
        return self._modules[key]

    def _made(self, key: str, estimator: AbstractEstimator, law: Law) -> nn.Module | None:
        state = estimator.make_state(law)
        if state is not None and any(True for _ in state.parameters()):
            self._trained[key] = state
            _take_from_store(f"estimator.{key}", state)
        if state is not None and (waiting := self._waiting.pop(key, None)) is not None:
            state.load_state_dict(waiting)
        return state

    def register(self) -> None:
        """Shows all parameters to Pyro's param store, so that ``SVI`` trains them.

        In the store they are named ``estimator.<site>$$$<parameter>``; a function that gives the
        optimiser its options by name sees ``estimator.<site>.<parameter>``.
        """
        for key, state in self._trained.items():
            pyro.module(f"estimator.{key}", state, update_module_params=True)

    def scratch(self) -> "EstimatorStates":
        """A copy to learn on: its buffers are its own, its parameters are shared."""
        shared: dict[int, Any] = {id(p): p for p in self.parameters()}
        copy = EstimatorStates()
        for key, state in self.named_children():
            copy.add_module(key, deepcopy(state, dict(shared)))
        copy._recipes = dict(self._recipes)
        copy._waiting = {key: dict(values) for key, values in self._waiting.items()}
        return copy

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, values in self._waiting.items():
            destination.update({f"{prefix}{key}.{name}": value for name, value in values.items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, value in state_dict.items():
            if name.startswith(prefix):
                key, _, rest = name[len(prefix) :].partition(".")
                if key not in self._modules:
                    self._waiting.setdefault(key, {})[rest] = value


def _take_from_store(name: str, state: nn.Module) -> None:
    """Takes the parameters that the store has, before they are used: it may have been loaded."""
    store = pyro.get_param_store()
    for path, made in list(state.named_parameters()):
        full_name = param_with_module_name(name, path)
        if full_name in store:
            known = store[full_name]
            if known.shape != made.shape:
                raise NonDiffError(
                    f"the param store has '{full_name}' of shape {tuple(known.shape)}, and the "
                    f"site's estimator has one of shape {tuple(made.shape)}: it is left from "
                    "another estimator. Call pyro.clear_param_store() between them."
                )
            owner, _, last = path.rpartition(".")
            state.get_submodule(owner)._parameters[last] = cast(nn.Parameter, known)


def own_gradients(losses: list[Tensor], states: EstimatorStates) -> Tensor | None:
    """A surrogate of the estimators' own losses that reaches their states alone."""
    parameters = [p for p in states.parameters() if p.requires_grad] if losses else []
    if not parameters:
        return None
    gradients = torch.autograd.grad(
        torch.stack(losses).sum(), parameters, retain_graph=True, allow_unused=True
    )
    pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    return torch.stack([(p * g).sum() for p, g in pairs]).sum() if pairs else None


def _key(name: str) -> str:
    return name.replace(".", "/")
