"""Lets Pyro's objectives, and laws, run without waiting for a value.

An objective reads values for its answer, a number, and for warnings of NaN; a law that was made
while validation was on reads whether a value is in its support. While a step is recorded an item
stays a tensor, there is nothing to warn of, and values are taken for valid.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.util import Dice, torch_item
from pyro.util import warn_if_inf, warn_if_nan
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

_ANSWERS = {inspect.getfile(thing) for thing in (torch_item, Trace_ELBO, TraceEnum_ELBO)}
_WARNINGS = (warn_if_nan.__code__, warn_if_inf.__code__)
_EXPECTATION = Dice.compute_expectation.__code__
_VALIDATION = inspect.getfile(Distribution)
_READING = (Tensor.item, Tensor.__bool__, Tensor.masked_select, torch._is_all_true)


class NotRead(TorchFunctionMode):
    """Answers for values that are read; it looks at who reads, so no mode may lie inside it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _READING:
            code = sys._getframe(1).f_code
            if func is Tensor.item and code.co_filename in _ANSWERS:
                return args[0].detach()
            if func in (Tensor.__bool__, torch._is_all_true) and code.co_filename == _VALIDATION:
                return True
            if func is Tensor.__bool__ and (code in _WARNINGS or code is _EXPECTATION):
                return False
            if func is Tensor.masked_select and code is _EXPECTATION:
                value, mask = args  # a sum of products follows: zeros do as well as nothing
                return torch.where(mask, value, torch.zeros_like(value)).reshape(-1)
        return func(*args, **(kwargs or {}))
