"""One torch optimiser for all parameters, made from an optimiser of Pyro.

Pyro makes an optimiser for each parameter. They are kept: they hold options and state in the
form that Pyro saves and loads, and schedulers act on them. The steps are taken by one optimiser whose
groups are the parameters with equal options, and whose state is theirs.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.optim.optim import _load_state_dict, is_scheduler
from torch import Tensor
from torch.optim import Optimizer

from ..errors import NonDiffError

_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_OUR_OWN = ("params", "foreach", "fused", "capturable")


class FusedOptimizer:
    """Takes the steps of an optimiser of Pyro for all parameters at once.

    Arguments:
        optim: The optimiser. It stays the place of options and state.

    Raises:
        NonDiffError: If it does more in a step than each parameter's own optimiser does.
    """

    def __init__(self, optim: PyroOptim) -> None:
        if not isinstance(optim, PyroOptim):
            raise NonDiffError(
                f"the optimiser must be one of pyro.optim, such as pyro.optim.Adam({{'lr': 1e-3}}), "
                f"found {type(optim).__name__}"
            )
        if type(optim).__call__ not in (PyroOptim.__call__, PyroLRScheduler.__call__):
            raise NonDiffError(
                f"{type(optim).__name__} takes steps of its own, which one optimiser for all "
                "parameters cannot carry over. Use pyro.infer.SVI with it."
            )
        self.optim = optim
        self._whole: dict[tuple[int, ...], list[_Group]] = {}

    def step(self, parameters: Sequence[Tensor]) -> None:
        """Moves parameters by their gradients; one without is left where it is.

        Raises:
            NonDiffError: If the options of a new parameter cannot be used. None has moved then.
        """
        for parameter in parameters:
            if parameter not in self.optim.optim_objs:
                self._meet(parameter)
        moving = [p for p in parameters if p.grad is not None]
        key = tuple(map(id, moving))
        groups = self._whole.get(key)
        if groups is None or not all(group.fits() for group in groups):
            groups = _grouped(moving, [self._single(p) for p in moving])
            self._whole[key] = groups
        for parameter in moving:
            if (clip := self.optim.grad_clip[parameter]) is not None:
                clip(parameter)
        for group in groups:
            group.step()

    def _single(self, parameter: Tensor) -> Optimizer:
        found = self.optim.optim_objs[parameter]
        return found.optimizer if is_scheduler(found) else found

    def _meet(self, parameter: Tensor) -> None:
        """What Pyro does when it first sees a parameter."""
        name = pyro.get_param_store().param_name(parameter)
        try:
            made = self.optim._get_optim(parameter)
            clip = self.optim._get_grad_clip(parameter)
        except (TypeError, ValueError, AssertionError) as error:
            raise NonDiffError(
                f"parameter '{name}': its optimiser cannot be made: {error}"
            ) from error
        if not isinstance(made.optimizer if is_scheduler(made) else made, Optimizer):
            raise NonDiffError(
                f"parameter '{name}': its optimiser is {type(made).__name__}, and none of torch. "
                "Use pyro.infer.SVI with it."
            )
        state = self.optim._state_waiting_to_be_consumed.pop(name, None)
        if state is not None:
            _load_state_dict(made, state)
        self.optim.optim_objs[parameter] = made
        self.optim.grad_clip[parameter] = clip


class _Group:
    """Parameters with equal options, and the optimiser that moves them."""

    def __init__(self, parameters: list[Tensor], singles: list[Optimizer]) -> None:
        self.singles = singles
        self.options = [single.param_groups[0] for single in singles]
        first = self.options[0]
        self.keys = [key for key in first if key not in _OUR_OWN]
        self.optimizer = self._joined(parameters)
        self.values = self._values(self.group)

    @property
    def group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[0]

    def _joined(self, parameters: list[Tensor]) -> Optimizer:
        kind, first = type(self.singles[0]), self.options[0]
        options = {key: value for key, value in first.items() if key != "params"}
        known = inspect.signature(kind.__init__).parameters
        joined = kind(parameters, **{k: v for k, v in options.items() if k in known})
        joined.param_groups[0].update(options)
        fast = _fast(joined, parameters, options)
        joined.param_groups[0].update(fast)
        for parameter, single in zip(parameters, self.singles, strict=True):
            state = single.state[parameter] or joined.state[parameter]
            if fast and isinstance(count := state.get("step"), Tensor):
                on = parameter.device if "fused" in fast else count.device
                state["step"] = count.to(device=on, dtype=torch.float32)
            single.state[parameter] = joined.state[parameter] = state
        return joined

    def _values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple([group.get(key) for key in self.keys])

    def fits(self) -> bool:
        """Whether the parameters still have the options that they were grouped by."""
        values = self.values
        return all(self._values(options) == values for options in self.options)

    def step(self) -> None:
        self.optimizer.step()
        values = self._values(self.group)
        if values != self.values:  # the optimiser has options of its own that change
            self.values = values
            for options in self.options:
                options.update(zip(self.keys, values, strict=True))
        for single in self.singles:
            single._opt_called = True  # type: ignore[attr-defined]  # schedulers look for it


def _grouped(parameters: list[Tensor], singles: list[Optimizer]) -> list[_Group]:
    groups: dict[Any, tuple[list[Tensor], list[Optimizer]]] = {}
    for parameter, single in zip(parameters, singles, strict=True):
        options = {k: v for k, v in single.param_groups[0].items() if k not in _OUR_OWN}
        own = id(single) if not type(single).__module__.startswith(("torch.", "pyro.")) else None
        key = type(single), own, parameter.dtype, parameter.device, repr(options)
        members = groups.setdefault(key, ([], []))
        members[0].append(parameter)
        members[1].append(single)
    return [_Group(*members) for members in groups.values()]


def _fast(
    joined: Optimizer, parameters: Sequence[Tensor], options: dict[str, Any]
) -> dict[str, Any]:
    """The quickest way to step that an optimiser of torch has, unless the user chose one."""
    chosen = any(options.get(key) for key in ("foreach", "fused", "capturable", "differentiable"))
    if chosen or not type(joined).__module__.startswith("torch."):
        return {}
    floating = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    tensor_lr = isinstance(options.get("lr"), Tensor)
    if type(joined) in _FUSED and floating and not tensor_lr:
        joined._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        return {"fused": True, "foreach": False}
    if "capturable" in options and parameters[0].device.type == "cuda":
        return {"capturable": True}
    return {}
