"""The derivative of a Gamma number at a fixed quantile, for a number that was drawn elsewhere."""

from typing import Any, cast

import torch
from torch import Tensor


def implicit_gamma(concentration: Tensor, drawn: Tensor) -> Tensor:
    """A standard Gamma number, with the derivative that torch gives its own.

    Arguments:
        concentration: At least float32, of the number's shape.
        drawn: The number, without gradient.
    """
    function: Any = _ImplicitGamma
    return cast(Tensor, function.apply(concentration, drawn))


class _ImplicitGamma(torch.autograd.Function):
    """A standard Gamma number that was drawn, with the derivative at its quantile.

    torch has no second derivative of it, and says so where one is asked for.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(concentration: Tensor, drawn: Tensor) -> Tensor:
        return drawn.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        concentration, drawn = ctx.saved_tensors
        return grad * torch._standard_gamma_grad(concentration, drawn), None
