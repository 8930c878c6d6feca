"""Programs that draw sites of their own, with costs: alone, and behind a guide.

A program that needs no law in particular is a function of a :class:`programs.Kind`. Parameters have
values that make every gradient differ from zero.
"""

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from pyro_nondiff.handlers import randomize
from pyro_nondiff.ops import argmax, cost, external, step

from .programs import Kind, Pair, parameter

Alone = Callable[[], None]

OWN = {"is_auxiliary": True}
"""Says that a site of the model is meant to have no partner."""

TABLE = np.array([[0.3, -1.0], [2.0, 0.7]])
"""Costs of two decisions: a look-up has no derivative."""


# --- programs of an expected cost -------------------------------------------------------------


def one_decision(kind: Kind) -> Alone:
    """A single site, and a cost with a parameter of its own."""

    def program() -> None:
        z = kind.number(pyro.sample("z", kind.law(parameter("a", -0.4))))
        cost("loss", (1.5 * z - parameter("p", 0.3)) ** 2)

    return program


def decisions(kind: Kind) -> Alone:
    """Three decisions in a row, with a cost before the first and after each."""

    def program() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        cost("toll", 0.7 + a**2)
        first = kind.number(pyro.sample("z1", kind.law(a)))
        cost("c1", 1.3 * first)
        second = kind.number(pyro.sample("z2", kind.law(b + a * first)))
        cost("c2", (second - 0.4 * first) ** 2)
        third = kind.number(pyro.sample("z3", kind.law(b * second - first)))
        cost("c3", first * third + parameter("p", 0.3) * second * third)

    return program


def buyers(kind: Kind, mask: str = "none") -> Alone:
    """A global decision, and local ones in a scaled plate, with masks; one cost is of all."""
    kept = torch.tensor([True, False])

    def program() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        top = kind.number(pyro.sample("g", kind.law(a)))
        with pyro.plate("buyers", 5, subsample=torch.tensor([3, 1])) as chosen:
            law = kind.law(b * (chosen - 1.5) + a * top)
            z = kind.number(pyro.sample("z", law.mask(kept) if mask == "law" else law))
            with poutine.mask(mask=kept if mask == "poutine" else torch.ones(2).bool()):
                cost("price", (z - 0.3 * chosen) ** 2 * (1 + top))

    return program


def looked_up() -> None:
    """Costs that NumPy makes: one after each decision."""
    a, b = parameter("a", -0.4), parameter("b", 0.6)
    with pyro.plate("data", 2):
        first = pyro.sample("z1", dist.Bernoulli(logits=a * torch.tensor([1.0, 0.4])))
        cost("early", TABLE[0][first.detach().numpy().astype(int)])
        second = pyro.sample("z2", dist.Bernoulli(logits=b - a * first))
        both = torch.broadcast_tensors(first, second)
        cost("late", TABLE[tuple(x.detach().numpy().astype(int) for x in both)])


def asked() -> None:
    """The same costs by ``external``, which is called for each element."""
    a, b = parameter("a", -0.4), parameter("b", 0.6)
    with pyro.plate("data", 2):
        first = pyro.sample("z1", dist.Bernoulli(logits=a * torch.tensor([1.0, 0.4])))
        cost("early", external("one", lambda i: TABLE[0][int(i)], first))
        second = pyro.sample("z2", dist.Bernoulli(logits=b - a * first))
        cost("late", external("two", lambda i, j: TABLE[int(i), int(j)], first, second))


def observed(kind: Kind) -> Alone:
    """An observation is a cost: what is minimised is its negative log-probability."""

    def program() -> None:
        a, s = parameter("a", -0.4), parameter("p", 0.3)
        z = kind.number(pyro.sample("z", kind.law(a)))
        pyro.sample("x", dist.Normal(z, s.exp()), obs=torch.tensor(0.8))
        w = kind.number(pyro.sample("w", kind.law(a * z + 0.2)))
        pyro.sample("y", dist.Normal(z * w, s.exp()), obs=torch.tensor(-0.3))

    return program


def normal_between(kind: Kind) -> Alone:
    """A reparameterised site after one decision and before another."""

    def program() -> None:
        a, b, s = parameter("a", -0.4), parameter("b", 0.6), parameter("s", -0.2)
        z = kind.number(pyro.sample("z", kind.law(a)))
        x = pyro.sample("x", dist.Normal(b * z + a, s.exp()))
        cost("reach", (x - z) ** 2)
        w = kind.number(pyro.sample("w", kind.law(b * x - 0.1)))
        cost("end", z * w * x - w * 0.4)

    return program


@randomize()
def randomized() -> None:
    """Ops that a handler makes random."""
    a, b = parameter("a", -0.4), parameter("b", 0.6)
    on = step("on", a)
    scores = torch.stack([a * on, b + on, 0 * on], -1)
    item = argmax("item", scores)
    cost("price", (item * torch.tensor([1.0, -0.4, 0.7])).sum(-1) * (1 + on) + 0.3 * on)


def branching(kind: Kind) -> Alone:
    """A decision that only some values of another bring about. Needs sequential worlds."""

    def program() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        z = kind.number(pyro.sample("z", kind.law(a)))
        total = 1.5 * z
        if z.item() > 0:
            w = kind.number(pyro.sample("w", kind.law(b + a * z)))
            total = total - 2 * w * parameter("p", 0.3)
        cost("end", (total - 0.4) ** 2)

    return program


# --- the model's own sites behind a guide -------------------------------------------------------


def downstream(kind: Kind) -> Pair:
    """The model draws after what the guide draws."""

    def model() -> None:
        p = parameter("p", 0.3)
        z = kind.number(pyro.sample("z", kind.law(p)))
        own = kind.number(pyro.sample("own", kind.law(p + 0.7 * z), infer=OWN))
        pyro.sample("x", dist.Normal(own + z * own * 0.6, 1.0), obs=torch.tensor(0.7))

    def guide() -> None:
        pyro.sample("z", kind.law(parameter("a", -0.4)))

    return model, guide


def upstream(kind: Kind) -> Pair:
    """The model draws before it meets what the guide draws."""

    def model() -> None:
        p = parameter("p", 0.3)
        own = kind.number(pyro.sample("own", kind.law(p), infer=OWN))
        pyro.sample("y", dist.Normal(2 * own, 1.1), obs=torch.tensor(-0.5))
        z = kind.number(pyro.sample("z", kind.law(p + 0.7 * own)))
        pyro.sample("x", dist.Normal(own + z * own * 0.6, 1.0), obs=torch.tensor(0.7))

    def guide() -> None:
        pyro.sample("z", kind.law(parameter("a", -0.4)))

    return model, guide


def between(kind: Kind) -> Pair:
    """Two own sites, before and after a site of the guide, which has one more at the end."""

    def model() -> None:
        p = parameter("p", 0.3)
        first = kind.number(pyro.sample("own1", kind.law(p), infer=OWN))
        z = kind.number(pyro.sample("z", kind.law(p * first)))
        second = kind.number(pyro.sample("own2", kind.law(z - p * first), infer=OWN))
        y = kind.number(pyro.sample("y", kind.law(second + p)))
        loc = first * second + z - 0.4 * y * second
        pyro.sample("x", dist.Normal(loc, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        z = kind.number(pyro.sample("z", kind.law(a)))
        pyro.sample("y", kind.law(b + a * z))

    return model, guide


def in_a_plate(kind: Kind) -> Pair:
    """A global site of the guide; own sites in a subsampled plate, and one that they make."""
    data = torch.tensor([0.3, -0.8, 1.2])

    def model() -> None:
        p = parameter("p", 0.3)
        top = kind.number(pyro.sample("g", kind.law(p)))
        with pyro.plate("data", 3, subsample=torch.tensor([2, 0])) as chosen:
            own = kind.number(pyro.sample("own", kind.law(p * data[chosen] + top), infer=OWN))
            pyro.sample("x", dist.Normal(own * (1 + top), 1.0), obs=data[chosen])
        total = own.sum(-1, keepdim=True)
        last = kind.number(pyro.sample("last", kind.law(p * total), infer=OWN))
        pyro.sample("y", dist.Normal(last + total, 1.2), obs=torch.tensor(0.5))

    def guide() -> None:
        pyro.sample("g", kind.law(parameter("a", -0.4)))

    return model, guide
