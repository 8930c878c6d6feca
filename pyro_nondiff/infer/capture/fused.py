"""One torch optimiser for all parameters, made from an optimiser of Pyro.

Pyro makes an optimiser for each parameter. They are kept: they hold options and state in the form
that Pyro saves and loads, and schedulers act on them. The steps are taken by one optimiser for all
parameters with equal options, whose state is theirs.
"""

import inspect
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, cast

import pyro
import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.optim.optim import _load_state_dict, is_scheduler
from torch import Tensor
from torch.optim import Optimizer

from ...errors import NonDiffError

_ADAMS = (torch.optim.Adam, torch.optim.AdamW)
_FUSED = (*_ADAMS, torch.optim.SGD)
_SPEED = ("foreach", "fused", "capturable", "differentiable")
_NOT_COMPARED = ("params", *_SPEED)


class FusedOptimizer:
    """Takes the steps of an optimiser of Pyro for all parameters at once.

    Arguments:
        optim: The optimiser. It stays the place of options and state.

    Raises:
        NonDiffError: If it does more in a step than each parameter's own optimiser does.
    """

    def __init__(self, optim: PyroOptim) -> None:
        found = type(optim).__name__
        if not isinstance(optim, PyroOptim):
            raise NonDiffError(
                "the optimiser must be one of pyro.optim, such as pyro.optim.Adam({'lr': 1e-3}), "
                f"found {found}"
            )
        if type(optim).__call__ not in (PyroOptim.__call__, PyroLRScheduler.__call__):
            raise NonDiffError(
                f"{found} takes steps of its own, which one optimiser for all parameters cannot "
                "carry over. Use pyro.infer.SVI with it."
            )
        self.optim = optim
        self._joined: dict[tuple[tuple[int, bool], ...], list[_Joined]] = {}
        self._moved: set[Tensor] = set()

    def step(self, parameters: Sequence[Tensor]) -> None:
        """Moves parameters by their gradients, which are taken away.

        One without a gradient is left where it is, until it has moved once: from then on it
        goes on by its momentum, as in Pyro.

        Raises:
            NonDiffError: If a new parameter's options cannot be used. None has moved then.
        """
        for parameter in parameters:
            if parameter not in self.optim.optim_objs:
                self._meet(parameter)
        for parameter in parameters:
            if parameter.grad is None and parameter in self._moved:
                parameter.grad = torch.zeros_like(parameter)
        moving = [parameter for parameter in parameters if parameter.grad is not None]
        for parameter in moving:
            if (clip := self.optim.grad_clip[parameter]) is not None:
                clip(parameter)
        for joined in self._groups(moving):
            joined.step()
        self._moved.update(moving)
        for parameter in moving:
            parameter.grad = None

    def _groups(self, moving: list[Tensor]) -> "list[_Joined]":
        key = tuple((id(p), p.is_contiguous()) for p in moving)
        groups = self._joined.get(key)
        if groups is None or not all(group.fits() for group in groups):
            groups = self._joined[key] = _grouped(moving, [self._single(p) for p in moving])
        return groups

    def _single(self, parameter: Tensor) -> Optimizer:
        return _optimizer_of(self.optim.optim_objs[parameter])

    def _meet(self, parameter: Tensor) -> None:
        """What Pyro does when it first sees a parameter."""
        name = pyro.get_param_store().param_name(parameter)
        try:
            made = self.optim._get_optim(parameter)
            clip = self.optim._get_grad_clip(cast(Any, parameter))
        except (TypeError, ValueError, AssertionError) as error:
            raise NonDiffError(
                f"parameter '{name}': its optimiser cannot be made: {error}"
            ) from error
        _check(name, _optimizer_of(made))
        state = self.optim._state_waiting_to_be_consumed.pop(name, None)
        if state is not None:
            _load_state_dict(made, state)
        self.optim.optim_objs[parameter] = made
        self.optim.grad_clip[parameter] = clip


class _Joined:
    """Parameters with equal options, and the optimiser that moves them."""

    def __init__(self, parameters: list[Tensor], singles: list[Optimizer]) -> None:
        self.singles = singles
        self.options = [single.param_groups[0] for single in singles]
        first = self.options[0]
        self.keys = [key for key in first if key not in _NOT_COMPARED]
        self.optimizer = _one_for_all(type(singles[0]), parameters, first)
        self.quick: Callable[[], None] | None = None
        self.read = itemgetter(*self.keys)  # quick: it is asked of each parameter at each step
        self.values = self.read(self.optimizer.param_groups[0])
        for parameter, single in zip(parameters, singles, strict=True):
            state = single.state[parameter] or self.optimizer.state[parameter]
            _place_count(state, parameter, self.optimizer.param_groups[0])
            single.state[parameter] = self.optimizer.state[parameter] = state

    def fits(self) -> bool:
        """Whether the parameters still have the options that they were grouped by."""
        values = self.values
        return all(self.read(options) == values for options in self.options)

    def step(self) -> None:
        """Moves them."""
        if self.quick is not None:
            self.quick()
        else:
            self.optimizer.step()
            self.quick = _quick(self.optimizer)
        group = self.optimizer.param_groups[0]
        if (values := self.read(group)) != self.values:  # ClippedAdam lowers its rate at each step
            self.values = values
            for options in self.options:
                options.update({key: group[key] for key in self.keys})
        for single in self.singles:
            single._opt_called = True  # type: ignore[attr-defined]  # schedulers look for it


def _optimizer_of(made: Any) -> Optimizer:
    return cast(Optimizer, made.optimizer if is_scheduler(made) else made)


def _check(name: str | None, optimizer: Optimizer) -> None:
    found = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise NonDiffError(
            f"parameter '{name}': its optimiser is {found}, and none of torch. Use pyro.infer.SVI "
            "with it."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise NonDiffError(
            f"parameter '{name}': {found} runs the program again in its steps, which is not "
            "supported. Use Adam or another optimiser that takes gradients."
        )


def _grouped(parameters: list[Tensor], singles: list[Optimizer]) -> list[_Joined]:
    groups: dict[Any, tuple[list[Tensor], list[Optimizer]]] = {}
    for parameter, single in zip(parameters, singles, strict=True):
        options = {k: v for k, v in single.param_groups[0].items() if k not in _NOT_COMPARED}
        unknown = not type(single).__module__.startswith(("torch.", "pyro."))
        own = id(single) if unknown else None  # it may look at all its parameters together
        key = type(single), own, parameter.dtype, parameter.device, repr(options)
        members = groups.setdefault(key, ([], []))
        members[0].append(parameter)
        members[1].append(single)
    return [_Joined(*members) for members in groups.values()]


def _one_for_all(
    kind: Callable[..., Optimizer], parameters: list[Tensor], options: dict[str, Any]
) -> Optimizer:
    """An optimiser like a single one, which steps in the quickest way that it has."""
    known = inspect.signature(kind).parameters
    rest = {key: value for key, value in options.items() if key != "params"}
    rest.update(_quickest(kind, parameters, options))
    joined = kind(parameters, **{key: value for key, value in rest.items() if key in known})
    joined.param_groups[0].update(rest)  # what is no argument, such as a scheduler's first rate
    return joined


def _quickest(
    kind: Callable[..., Optimizer], parameters: Sequence[Tensor], options: dict[str, Any]
) -> dict[str, Any]:
    if any(options.get(key) for key in _SPEED):
        return {}  # the user chose
    usual = all(
        p.is_floating_point() and p.is_contiguous() and p.device.type in ("cpu", "cuda")
        for p in parameters
    )  # torch's fused forms take memory as it lies
    if kind in _FUSED and usual and not isinstance(options.get("lr"), Tensor):
        return {"fused": True, "foreach": False}
    on_gpu = parameters[0].device.type == "cuda"
    return {"capturable": True} if on_gpu and "capturable" in options else {}


def _place_count(state: dict[str, Any], parameter: Tensor, options: dict[str, Any]) -> None:
    """Puts the number of steps, which may have been loaded, to where the optimiser wants it."""
    count = state.get("step")
    if isinstance(count, Tensor) and (options.get("fused") or options.get("capturable")):
        state["step"] = count.to(parameter.device, torch.float32)


def _quick(optimizer: Optimizer) -> Callable[[], None] | None:
    """The further steps of a fused Adam by its kernel alone, or None for another optimiser.

    What torch does around the kernel takes ten times as long as moving a few thousand numbers.
    """
    (group,), kind = optimizer.param_groups, type(optimizer)
    if kind not in _ADAMS or not group["fused"]:
        return None
    parameters = group["params"]
    states = [optimizer.state[parameter] for parameter in parameters]
    counts = [state["step"] for state in states]
    firsts, seconds = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
    greatest = [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else []
    beta1, beta2 = group["betas"]
    options = {key: group[key] for key in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
    options.update(beta1=beta1, beta2=beta2)
    decoupled = group.get("decoupled_weight_decay", kind is torch.optim.AdamW)
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_

    def step() -> None:
        gradients = [parameter.grad for parameter in parameters]
        with torch.no_grad():
            torch._foreach_add_(counts, 1)
            kernel(parameters, gradients, firsts, seconds, greatest, counts, **options)

    return step
