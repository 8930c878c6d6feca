"""What worlds a run has, and how their dimensions lie.

A value has two dimensions at the left of all plates: rows (the base run and the
branches), then base worlds. Where a value is the same in all of them the dimension has
size 1, and leading dimensions of size 1 are left out, so that a program that needs one
world runs with the shapes that it has under Pyro.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Mode = Literal["plain", "expanded", "sequential"]


class Branches(NamedTuple):
    """How many worlds branch at a site, and the masses of its rows, see ``Ask``."""

    site: str
    hard: int
    soft: int
    base_mass: float = 1.0
    hard_mass: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What worlds a run has.

    Rows are ordered: the base run, the hard branches of all sites, their soft branches.

    Arguments:
        base: The number of base worlds.
        branches: What each branching site has, in the order of their rows.
        nesting: How many plate dimensions lie at the right of the worlds.
        mode: ``"plain"``: one run, values as small as they can be. ``"expanded"``: one
            run, latent values expanded to all worlds. ``"sequential"``: a run a world.
    """

    base: int = 1
    branches: tuple[Branches, ...] = ()
    nesting: int = 0
    mode: Mode = "plain"

    @property
    def num_hard(self) -> int:
        """How many rows are hard, the base run among them."""
        return 1 + sum(branch.hard for branch in self.branches)

    @property
    def num_rows(self) -> int:
        """The number of rows of a vectorised run."""
        return self.num_hard + sum(branch.soft for branch in self.branches)

    @property
    def single(self) -> bool:
        """Whether a run is one world."""
        return self.base == self.num_rows == 1

    def union(self, other: "Plan") -> "Plan":
        """A plan with the worlds of both, in this one's mode."""
        known = {branch.site for branch in self.branches}
        new = tuple(branch for branch in other.branches if branch.site not in known)
        return Plan(
            max(self.base, other.base),
            self.branches + new,
            max(self.nesting, other.nesting),
            self.mode,
        )

    def rows_of(self, site: str) -> tuple[slice, slice]:
        """The hard and the soft rows that branch at a site."""
        hard, soft = 1, self.num_hard
        for branch in self.branches:
            if branch.site == site:
                return slice(hard, hard + branch.hard), slice(soft, soft + branch.soft)
            hard, soft = hard + branch.hard, soft + branch.soft
        return slice(hard, hard), slice(soft, soft)


def lift_behind(x: Tensor, rank: int) -> Tensor:
    """Adds dimensions of size 1 behind the first, up to a rank without the first."""
    return x.reshape(x.shape[:1] + (1,) * (rank + 1 - x.dim()) + x.shape[1:])


def lift(x: Tensor, rank: int) -> Tensor:
    """Adds dimensions of size 1 at the left, up to a rank."""
    return x.reshape((1,) * (rank - x.dim()) + x.shape) if x.dim() < rank else x
