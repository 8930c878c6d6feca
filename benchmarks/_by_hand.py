"""Hand-written gradients, recorded and compiled as a whole, and stepped by one fused Adam."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from _timing import Step
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import softplus

Gradients = Callable[..., tuple[Tensor, ...]]
"""From parameters and other tensors to a loss, the parameters' gradients, and new states."""


def bernoulli(logits: Tensor, value: Tensor) -> Tensor:
    """The log-probability of bits."""
    return value * logits - softplus(logits)


def leave_one_out(costs: Tensor) -> Tensor:
    """Costs less the mean of the other samples', over the number of samples; the last dimension."""
    return (costs - costs.mean(-1, keepdim=True)) / (costs.shape[-1] - 1)


def compiled(
    function: Gradients, example: Sequence[Tensor], options: dict[str, Any] | None
) -> Gradients:
    """The function as one graph, compiled by inductor, under CUDA graphs on a GPU.

    Arguments:
        function: What is compiled.
        example: Tensors as it will get.
        options: Of inductor; None replays the recorded operations one by one.
    """
    with torch.no_grad():
        graph = make_fx(function, tracing_mode="fake")(*example)
        graph.graph.set_codegen(fx.graph.CodeGen())
        graph.recompile()
        if options is None:
            return graph
        if any(tensor.is_cuda for tensor in example):
            options = {**options, "triton.cudagraphs": True}
        return torch._inductor.compile(graph, list(example), options=options)


def step_of(
    function: Gradients,
    parameters: Sequence[Tensor],
    given: Sequence[Tensor],
    states: Sequence[Tensor],
    learning_rate: float,
    backend: str,
) -> Step:
    """A step of training.

    Arguments:
        function: Takes parameters, what is given, and states, in this order.
        parameters: What is trained.
        given: Data.
        states: What the function returns anew, behind the gradients.
        learning_rate: Of Adam.
        backend: ``"inductor"``, or ``"replay"`` for a test.
    """
    options = None if backend == "replay" else {"fallback_random": True}  # eager mode's draws
    call = compiled(function, [*parameters, *given, *states], options)
    adam = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    held = list(states)
    count = len(parameters)

    def step() -> Tensor:
        with torch.no_grad():
            loss, *rest = call(*parameters, *given, *held)
        for parameter, gradient in zip(parameters, rest[:count], strict=True):
            parameter.grad = gradient
        adam.step()
        held[:] = rest[count:]
        return loss

    return step
