"""Ways to run a recorded step."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

Backend = Literal["inductor", "replay", "eager"]
Run = Callable[[list[Tensor]], Sequence[Tensor]]

LARGEST = 1500
"""How many operations inductor is given: its time grows faster than their number."""

_log = logging.getLogger(__name__)


def runner(graph: fx.GraphModule, example: Sequence[Tensor], backend: Backend, size: int) -> Run:
    """A function that runs a recorded graph without autograd.

    Arguments:
        graph: The graph, of tensors in their order.
        example: Tensors as it will get.
        backend: ``"inductor"``, or ``"replay"`` for the operations one by one.
        size: How many operations the graph has.
    """
    if backend == "inductor" and size > LARGEST:
        _log.info(
            "the step has %d operations, more than the %d that are compiled: it is replayed",
            size,
            LARGEST,
        )
        backend = "replay"
    call = _compiled(graph, example, size) if backend == "inductor" else graph.forward

    def run(tensors: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            found: Sequence[Tensor] = call(*tensors)
        return found

    return run


def _compiled(graph: fx.GraphModule, example: Sequence[Tensor], size: int) -> Callable[..., Any]:
    options: dict[str, Any] = {"fallback_random": True}  # the draws that eager mode has
    if any(tensor.is_cuda for tensor in example):
        options["triton.cudagraphs"] = True
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    output.args = (tuple(output.args[0]),)
    graph.recompile()
    _log.info("inductor compiles a step of %d operations", size)
    start = time.perf_counter()
    with torch.no_grad():
        call: Callable[..., Any] = torch._inductor.compile(
            graph, [tensor.detach() for tensor in example], options=options
        )
    _log.info("compiled in %.1f s", time.perf_counter() - start)
    return call
