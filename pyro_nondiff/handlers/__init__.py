"""How an op is smoothed: chosen from outside, one handler a program or one a site.

Each is a Pyro Messenger: a context manager, a decorator, and a wrapper of a program. They nest, and
the innermost that applies to an op wins.
"""

from ._hard import given as given
from ._hard import ignore as ignore
from ._hard import replay as replay
from ._perturb import perturb as perturb
from ._randomize import mode as mode
from ._randomize import randomize as randomize
from ._soften import soften as soften
from ._spatial_transformer import SpatialTransformer as SpatialTransformer
from ._straight_through import straight_through as straight_through
from .base import AbstractChooser as AbstractChooser
from .base import AbstractHandler as AbstractHandler

__all__ = [
    "AbstractChooser",
    "AbstractHandler",
    "SpatialTransformer",
    "given",
    "ignore",
    "mode",
    "perturb",
    "randomize",
    "replay",
    "soften",
    "straight_through",
]
