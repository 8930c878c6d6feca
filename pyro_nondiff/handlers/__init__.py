"""How an op is smoothed: chosen from outside, one handler a program or one a site.

Each is a Pyro Messenger: a context manager, a decorator, and a wrapper of a program. They nest, and
the innermost that applies to an op wins.
"""

from .base import AbstractChooser as AbstractChooser
from .base import AbstractHandler as AbstractHandler
from .hard import ignore as ignore
from .hard import replay as replay
from .hard import straight_through as straight_through
from .perturb import perturb as perturb
from .randomize import mode as mode
from .randomize import randomize as randomize
from .soften import soften as soften

__all__ = [
    "AbstractChooser",
    "AbstractHandler",
    "ignore",
    "mode",
    "perturb",
    "randomize",
    "replay",
    "soften",
    "straight_through",
]
