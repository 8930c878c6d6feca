"""What makes an op an effect: handlers answer for it, and a trace sees the value.

A program calls ``op(name, *args)``. The handlers around it are asked, from the innermost out, who
answers; with no answer the op does the plain, hard thing. An answer is a value, which is recorded
as ``pyro.deterministic`` does, or a law, from which the value is drawn at a sample site of the op's
name. So what Pyro's own handlers do with sites they do with ops.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor

from ..errors import NonDiffError

__all__ = [
    "IN_WORLDS",
    "RANDOMIZED",
    "Answer",
    "Call",
    "Drawn",
    "Op",
    "Value",
    "decide",
    "op",
    "plain",
]

Op = Callable[..., Any]

RANDOMIZED = "randomized"
"""The entry of a site's ``infer`` dictionary that says that a handler made the site of an op."""

IN_WORLDS = "drawn_in_worlds"
"""The entry of a site's message that says that an objective has drawn it, or given its value."""


class Call(NamedTuple):
    """An op as a program meets it.

    Arguments:
        op: The op, such as ``argmax``.
        name: The name that the program gives it.
    """

    op: Op
    name: str


class Answer(NamedTuple):
    """What an op does.

    Arguments:
        respond: Makes the value, or the law to draw it from: ``respond(name, *args, **kwargs)``.
        hard: Whether the value is one that the op itself could give.
    """

    respond: Callable[..., Any]
    hard: bool


class Drawn(NamedTuple):
    """The answer that an op's value is drawn at a sample site of the op's name.

    Arguments:
        law: The law of the site.
        then: What makes the op's value of the site's; None if it is the same.

    Example:
        >>> from pyro_nondiff.handlers import randomize
        >>> from pyro_nondiff.ops import Drawn, op
        >>> @op
        ... def pixel(name, image, place):
        ...     return image[..., int(place)]
        >>> @randomize.rule(pixel)
        ... def random_pixel(handler, name, image, place):
        ...     law = dist.Normal(place, handler.temperature)
        ...     return Drawn(law, then=lambda drawn: image[..., drawn.round().int()])
        >>> with randomize(temperature=0.01):
        ...     pixel("p", torch.tensor([1.0, 2.0, 3.0]), torch.tensor(1.0))
        tensor(2.)
    """

    law: Any
    then: Callable[[Any], Any] | None = None


class Value(NamedTuple):
    """An op's value, and whether it is known to be hard."""

    value: Any
    hard: bool


def plain(op: Op) -> Op:
    """What an op does with no handler, as a function that is no effect."""
    function: Op = vars(op)["__wrapped__"]
    return function


@effectful(type="nondiff")
def _ask(call: Call) -> Answer:
    """Asks the handlers who answers; the default of the effect is the op itself."""
    return Answer(plain(call.op), hard=True)


def decide(op: Op, name: str, *args: Any, **kwargs: Any) -> Value:
    """An op's value, by the handlers around it and Pyro's."""
    if not isinstance(name, str):
        raise NonDiffError(
            f"{op.__name__}: the first argument is the op's name, found {type(name).__name__}. "
            f'Write {op.__name__}("name", ...).'
        )
    answer: Answer = _ask(Call(op, name), name=name)
    found = answer.respond(name, *args, **kwargs)
    if isinstance(found, Drawn):
        infer: Any = {RANDOMIZED: True}
        drawn = pyro.sample(name, found.law, infer=infer)
        return Value(drawn if found.then is None else found.then(drawn), hard=False)
    if not am_i_wrapped() or not isinstance(found, Tensor):
        return Value(found, answer.hard)
    recorded = _record(name, found)
    return Value(recorded, answer.hard and recorded is found)


def _record(name: str, value: Tensor) -> Tensor:
    """As ``pyro.deterministic``, which under validation would wait for the value.

    Pyro's objectives ask of each site of a guide that the model has it, or that it is auxiliary.
    """
    law = dist.Delta(value, event_dim=value.dim(), validate_args=False).mask(False)
    infer: Any = {"_deterministic": True, "is_auxiliary": True}
    recorded: Tensor = pyro.sample(name, law, obs=value, infer=infer)
    return recorded


def op(plain: Callable[..., Any]) -> Op:
    """Makes an op of a function ``plain(name, *args, **kwargs)`` that does the hard thing.

    A handler learns what to do with it by ``@handler.rule(op)``.

    Arguments:
        plain: What the op does with no handler. It returns a tensor.

    Example:
        >>> from pyro_nondiff.handlers import soften
        >>> from pyro_nondiff.ops import op
        >>> @op
        ... def sign(name, x):
        ...     return x.sign()
        >>> @soften.rule(sign)
        ... def soft_sign(handler, name, x):
        ...     return (x / handler.temperature).tanh()
        >>> x = torch.tensor([-1.0, 2.0])
        >>> sign("s", x)
        tensor([-1.,  1.])
        >>> with soften(temperature=0.5):
        ...     sign("s", x)
        tensor([-0.9640,  0.9993])
    """

    @wraps(plain)
    def perform(name: str, *args: Any, **kwargs: Any) -> Any:
        return decide(perform, name, *args, **kwargs).value

    return perform
