"""A depth-first walk through all outcomes of a program's random choices."""

from collections.abc import Iterator, Sequence

__all__ = ["Walk", "outcomes"]


class Walk:
    """One path through a program's choices.

    Arguments:
        prefix: The first choices of the path; after them the first possible one is taken.
    """

    def __init__(self, prefix: Sequence[int] = ()) -> None:
        self.probability = 1.0
        self._prefix = prefix
        self._path: list[tuple[int, Sequence[float]]] = []

    def choose(self, probabilities: Sequence[float]) -> int:
        """Takes one of several possibilities, and counts its probability."""
        depth = len(self._path)
        chosen = self._prefix[depth] if depth < len(self._prefix) else _first(probabilities, 0)
        self._path.append((chosen, probabilities))
        self.probability *= probabilities[chosen]
        return chosen

    def following(self) -> list[int] | None:
        """The prefix of the next path, or None after the last."""
        for depth in range(len(self._path) - 1, -1, -1):
            chosen, probabilities = self._path[depth]
            later = _first(probabilities, chosen + 1)
            if later < len(probabilities):
                return [index for index, _ in self._path[:depth]] + [later]
        return None


def _first(probabilities: Sequence[float], start: int) -> int:
    possible = (i for i in range(start, len(probabilities)) if probabilities[i] > 0)
    return next(possible, len(probabilities))


def outcomes() -> Iterator[Walk]:
    """All paths of a program, one after the other.

    The program runs once for each path that is yielded, and takes its random choices from
    :meth:`Walk.choose`. What it chooses may depend on earlier choices.

    Example:
        >>> from pyro_nondiff.testing import outcomes
        >>> total = 0.0
        >>> for walk in outcomes():
        ...     coins = walk.choose([0.5, 0.5]) + walk.choose([0.9, 0.1])
        ...     total += walk.probability * coins
        >>> round(total, 12)
        0.6
    """
    prefix: list[int] | None = []
    while prefix is not None:
        walk = Walk(prefix)
        yield walk
        prefix = walk.following()
