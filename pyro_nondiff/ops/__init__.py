"""What has no derivative: ops that a program states, and handlers smooth from outside."""

from ._choice import argmax as argmax
from ._choice import step as step
from ._op import op as op

__all__ = ["argmax", "op", "step"]
