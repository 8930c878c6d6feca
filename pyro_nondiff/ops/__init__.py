"""What has no derivative: ops that a program states, and handlers smooth from outside.

With no handler each does the plain, hard thing. Its name picks it out for a handler, see
:mod:`pyro_nondiff.handlers`, and in a trace: an op is recorded as ``pyro.deterministic`` does, or
is a sample site if :class:`pyro_nondiff.handlers.randomize` answers for it.
"""

from ._choice import argmax as argmax
from ._choice import select as select
from ._choice import step as step
from ._op import Drawn as Drawn
from ._op import op as op
from ._outside import cost as cost
from ._outside import external as external
from ._spatial import crop as crop
from ._spatial import paste as paste
from ._spatial import warp as warp

__all__ = [
    "Drawn",
    "argmax",
    "cost",
    "crop",
    "external",
    "op",
    "paste",
    "select",
    "step",
    "warp",
]
