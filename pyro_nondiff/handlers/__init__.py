"""How an op is smoothed: chosen from outside, one handler a program or one a site."""

from .base import AbstractHandler as AbstractHandler
from .soften import soften as soften

__all__ = ["AbstractHandler", "soften"]
