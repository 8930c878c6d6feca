"""A walk takes every path once, with its probability."""

import pytest

from pyro_nondiff.testing import Walk, outcomes


def paths(probabilities: list[list[float]]) -> list[tuple[tuple[int, ...], float]]:
    """Every path through choices that do not depend on one another."""
    found = []
    for walk in outcomes():
        found.append((tuple(walk.choose(each) for each in probabilities), walk.probability))
    return found


def test_every_path_is_taken_once_in_order() -> None:
    found = paths([[0.5, 0.5], [0.2, 0.3, 0.5]])
    assert [path for path, _ in found] == [(i, j) for i in range(2) for j in range(3)]


def test_probabilities_multiply_and_sum_to_one() -> None:
    found = dict(paths([[0.5, 0.5], [0.2, 0.3, 0.5]]))
    assert found[1, 2] == 0.5 * 0.5
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-15)


def test_choices_may_depend_on_earlier_ones() -> None:
    found = {}
    for walk in outcomes():
        path = [walk.choose([0.75, 0.25])]
        if path[0] == 1:
            path.append(walk.choose([0.4, 0.6]))
        found[tuple(path)] = walk.probability
    assert found == {(0,): 0.75, (1, 0): 0.25 * 0.4, (1, 1): 0.25 * 0.6}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_impossible_is_left_out(place: int) -> None:
    probabilities = [0.5, 0.5]
    probabilities.insert(place, 0.0)
    found = paths([probabilities, [1.0]])
    assert [path[0] for path, _ in found] == [i for i in range(3) if i != place]


def test_a_program_without_choices_has_one_outcome() -> None:
    assert paths([]) == [((), 1.0)]


def test_a_prefix_is_followed_then_the_first_possible_path() -> None:
    walk = Walk([1])
    assert walk.choose([0.5, 0.5]) == 1
    assert walk.choose([0.0, 1.0]) == 1
    assert walk.probability == 0.5
    assert walk.following() is None
