"""Ways to run a recorded step."""

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

from .pieces import CannotCutError, in_pieces
from .simplify import calls_outside, operations, simplify

Backend = Literal["inductor", "replay", "eager"]
Run = Callable[[list[Tensor]], Sequence[Tensor]]

WHOLE = 2500
"""How many operations inductor is given at once; longer steps are compiled in pieces.

A chain of 50 sites, 2000 to 2200 operations, takes inductor 1.3 times as long whole as in pieces,
and each of its steps 0.43 times as long. Whole, the time grows with the chain.
"""

_log = logging.getLogger(__name__)


def runner(graph: fx.GraphModule, example: Sequence[Tensor], backend: Backend, size: int) -> Run:
    """A function that runs a recorded graph without autograd.

    Arguments:
        graph: The graph, of tensors in their order. It is simplified if it is compiled.
        example: Tensors as it will get: compiled code does not look at shapes and strides.
        backend: ``"inductor"``, or ``"replay"`` for the operations one by one.
        size: How many operations the graph has.
    """
    call = _compiled(graph, example, size) if backend == "inductor" else graph.forward

    def run(tensors: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            found: Sequence[Tensor] = call(*tensors)
        return found

    return run


def _compiled(graph: fx.GraphModule, example: Sequence[Tensor], size: int) -> Callable[..., Any]:
    options: dict[str, Any] = {
        "fallback_random": True,  # the draws that eager mode has
        "cpp.vec_isa_ok": True,  # no trial of what the processor says that it has: 5 s, once
        "size_asserts": False,  # 0.4 us for each tensor that goes in; their kinds are known
    }
    if any(tensor.is_cuda for tensor in example) and not any(map(calls_outside, operations(graph))):
        options["triton.cudagraphs"] = True
    compile_one = partial(_inductor, options)
    start = time.perf_counter()
    simplify(graph)
    left = len(operations(graph))
    _log.info("inductor compiles %d of %d operations", left, size)
    call = None
    if left > WHOLE:
        try:
            joined, count = in_pieces(graph, compile_one)
        except CannotCutError as error:
            _log.info("the step is compiled whole: %s", error)
        else:
            _log.info("in %d different pieces", count)
            call = joined.forward
    if call is None:
        call = compile_one(_copy(graph), [tensor.detach() for tensor in example])
    _log.info("compiled in %.1f s", time.perf_counter() - start)
    return call


def _copy(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph that inductor may change; it wants a tuple to be returned."""
    copy = fx.Graph()
    copy.output(tuple(cast(Any, copy.graph_copy(graph.graph, {}))))
    return fx.GraphModule(graph, copy)


def _inductor(
    options: dict[str, Any], graph: fx.GraphModule, example: Sequence[Tensor]
) -> Callable[..., Any]:
    # without shapes torch keeps nothing on disk; what they need is imported, since it was recorded
    shapes = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    fake = FakeTensorMode(shape_env=shapes)
    with torch.no_grad(), tracing(TracingContext(fake)), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which torch imports
        call: Callable[..., Any] = torch._inductor.compile(graph, list(example), options=options)
    return call
