"""Lets Pyro's own objectives run without waiting for a value.

They read values for their answer, a number, and for warnings of NaN. While a step is recorded an
item stays a tensor, and the warnings are left out.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.util import Dice, torch_item
from pyro.util import warn_if_inf, warn_if_nan
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ITEM = torch_item.__code__
_WARNINGS = (warn_if_nan.__code__, warn_if_inf.__code__)
_EXPECTATION = Dice.compute_expectation.__code__


class NotRead(TorchFunctionMode):
    """Answers for values that an objective of Pyro reads."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (Tensor.item, Tensor.__bool__, Tensor.masked_select):
            code = sys._getframe(1).f_code
            if func is Tensor.item and code is _ITEM:
                return args[0].detach()
            if func is Tensor.__bool__ and (code in _WARNINGS or code is _EXPECTATION):
                return False
            if func is Tensor.masked_select and code is _EXPECTATION:
                value, mask = args  # a sum of products follows: zeros do as well as nothing
                return torch.where(mask, value, torch.zeros_like(value)).reshape(-1)
        return func(*args, **(kwargs or {}))
