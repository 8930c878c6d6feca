"""Programs small enough to enumerate, one a structure, each for any law of finite support.

A structure is a function from a :class:`Kind` to a model and a guide. All of their parameters
are made by :func:`parameter`, with values that make every gradient differ from zero.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

Program = Callable[..., Any]
Pair = tuple[Program, Program]
Structure = Callable[["Kind"], Pair]


@dataclass(frozen=True)
class Kind:
    """A law of finite support.

    ``law`` makes it of real numbers, one for each batch element. ``number`` makes a real number
    of each value, so that the same structure serves every law.
    """

    name: str
    law: Callable[[Tensor], Any]
    number: Callable[[Tensor], Tensor]


def _three(score: Tensor) -> Tensor:
    return score.unsqueeze(-1) * torch.tensor([0.7, -0.4, 0.1]) + torch.tensor([0.2, 0.0, -0.3])


def _two(score: Tensor) -> Tensor:
    return score.unsqueeze(-1) * torch.tensor([1.0, -0.6]) + torch.tensor([0.1, 0.4])


def _category_number(value: Tensor) -> Tensor:
    return torch.tensor([0.5, -1.0, 1.3])[value]


def _bits_number(value: Tensor) -> Tensor:
    """Not a sum over bits: an estimator that separates them would be found out."""
    first, second = value[..., 0], value[..., 1]
    return 1.1 * first - 0.6 * second + 0.9 * first * second


BERNOULLI = Kind("bernoulli", lambda s: dist.Bernoulli(logits=s), lambda value: value)
ONE_HOT = Kind(
    "one_hot",
    lambda s: dist.OneHotCategorical(logits=_three(s)),
    lambda value: (value * torch.tensor([0.5, -1.0, 1.3])).sum(-1),
)
CATEGORICAL = Kind("categorical", lambda s: dist.Categorical(logits=_three(s)), _category_number)
BITS = Kind("bits", lambda s: dist.Bernoulli(logits=_two(s)).to_event(1), _bits_number)
KINDS = {kind.name: kind for kind in (BERNOULLI, ONE_HOT, CATEGORICAL, BITS)}


def parameter(name: str, value: float) -> Tensor:
    """A parameter of Pyro's param store."""
    return pyro.param(name, torch.tensor(value))


def one_site(kind: Kind) -> Pair:
    """A single site."""

    def model() -> None:
        p = parameter("p", 0.3)
        z = kind.number(pyro.sample("z", kind.law(p)))
        pyro.sample("x", dist.Normal(1.5 * z - p, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        pyro.sample("z", kind.law(parameter("a", -0.4)))

    return model, guide


def shared_logit(kind: Kind) -> Pair:
    """Two sites with one parameter, and a cost that is a product."""

    def model() -> None:
        p = parameter("p", 0.3)
        first, second = (kind.number(pyro.sample(name, kind.law(p))) for name in ("z1", "z2"))
        pyro.sample("x", dist.Normal(1.5 * first * second + first, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        a = parameter("a", -0.4)
        for name in ("z1", "z2"):
            pyro.sample(name, kind.law(a))

    return model, guide


def chain(kind: Kind) -> Pair:
    """Three sites, each dependent on those before it."""

    def model() -> None:
        p = parameter("p", 0.3)
        first = kind.number(pyro.sample("z1", kind.law(p)))
        second = kind.number(pyro.sample("z2", kind.law(p * first - 0.2)))
        third = kind.number(pyro.sample("z3", kind.law(0.4 * second + p)))
        loc = first * second * third + 0.7 * second - third + p
        pyro.sample("x", dist.Normal(loc, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        first = kind.number(pyro.sample("z1", kind.law(a)))
        second = kind.number(pyro.sample("z2", kind.law(b + a * first)))
        pyro.sample("z3", kind.law(b * second - first))

    return model, guide


def reversed_layers(kind: Kind) -> Pair:
    """Two layers that the model meets in the other order."""

    def model() -> None:
        p = parameter("p", 0.3)
        top = kind.number(pyro.sample("z2", kind.law(p)))
        pyro.sample("y", dist.Normal(top, 1.1), obs=torch.tensor(-0.5))
        bottom = kind.number(pyro.sample("z1", kind.law(p * top - 0.2)))
        pyro.sample("x", dist.Normal(1.5 * bottom - p, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        bottom = kind.number(pyro.sample("z1", kind.law(a)))
        pyro.sample("z2", kind.law(b + a * bottom))

    return model, guide


def early_terms(kind: Kind) -> Pair:
    """A model with terms before the first site, and after each site."""

    def model() -> None:
        p = parameter("p", 0.3)
        pyro.sample("w", dist.Normal(p, 1.2), obs=torch.tensor(1.4))
        first = kind.number(pyro.sample("z1", kind.law(p)))
        pyro.sample("y", dist.Normal(2 * first, 1.1), obs=torch.tensor(-0.5))
        second = kind.number(pyro.sample("z2", kind.law(p - first)))
        pyro.sample("x", dist.Normal(first * second, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        first = kind.number(pyro.sample("z1", kind.law(a)))
        pyro.sample("z2", kind.law(b + a * first))

    return model, guide


def nested_plates(kind: Kind, mask: str = "none", index: tuple[int, ...] = (1,)) -> Pair:
    """A site inside two plates, the outer one subsampled, with a mask of either sort."""
    data = torch.tensor([0.3, -0.8, 1.2])
    kept = torch.tensor([True, False])

    def masked(law: Any) -> Any:
        return law.mask(kept) if mask == "law" else law

    def plates() -> tuple[Any, Any]:
        rows = pyro.plate("rows", 3, subsample=torch.tensor(index), dim=-2)
        return rows, pyro.plate("columns", 2, dim=-1)

    def around() -> Any:
        return poutine.mask(mask=kept) if mask == "poutine" else nullcontext()

    def model() -> None:
        p = parameter("p", 0.3)
        rows, columns = plates()
        with rows as chosen, columns, around():
            x = data[chosen].unsqueeze(-1)
            z = kind.number(pyro.sample("z", masked(kind.law(p * x))))
            law = dist.Normal(1.5 * z - p, 1.3)
            pyro.sample("x", masked(law), obs=x.expand(-1, 2))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        rows, columns = plates()
        with rows as chosen, columns, around():
            x = data[chosen].unsqueeze(-1)
            pyro.sample("z", masked(kind.law(a * x + b * torch.tensor([1.0, -0.5]))))

    return model, guide


def masked_site(kind: Kind, mask: str = "poutine") -> Pair:
    """A masked site that an observation without a mask depends on: it is drawn all the same."""
    kept = torch.tensor([True, False])

    def sample(score: Tensor) -> Tensor:
        if mask == "law":
            return pyro.sample("z", kind.law(score).mask(kept))
        with poutine.mask(mask=kept):
            return pyro.sample("z", kind.law(score))

    def model() -> None:
        p = parameter("p", 0.3)
        with pyro.plate("data", 2):
            z = kind.number(sample(p * torch.tensor([1.0, 0.4])))
            pyro.sample("x", dist.Normal(1.5 * z - p, 1.3), obs=torch.tensor([0.8, -0.9]))

    def guide() -> None:
        a = parameter("a", -0.4)
        with pyro.plate("data", 2):
            sample(a * torch.tensor([1.0, -0.7]))

    return model, guide


def scaled(kind: Kind) -> Pair:
    """Scales of whole programs and of single sites, not the same in model and guide."""

    def model() -> None:
        p = parameter("p", 0.3)
        with poutine.scale(scale=0.6):
            first = kind.number(pyro.sample("z1", kind.law(p)))
            with poutine.scale(scale=3.0):
                pyro.sample("y", dist.Normal(first, 1.1), obs=torch.tensor(-0.5))
        second = kind.number(pyro.sample("z2", kind.law(p * first)))
        with poutine.scale(scale=torch.tensor(2.5)):
            pyro.sample("x", dist.Normal(first * second, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        with poutine.scale(scale=0.4):
            first = kind.number(pyro.sample("z1", kind.law(a)))
        with poutine.scale(scale=1.7):
            pyro.sample("z2", kind.law(b + a * first))

    return model, guide


def local_plate(kind: Kind) -> Pair:
    """A global site, then local ones whose costs stay apart."""

    def model() -> None:
        p = parameter("p", 0.3)
        g = kind.number(pyro.sample("g", kind.law(p)))
        with pyro.plate("data", 2):
            z = kind.number(pyro.sample("z", kind.law(p + g)))
            pyro.sample("x", dist.Normal(z * g, 1.3), obs=torch.tensor([0.8, -0.9]))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        g = kind.number(pyro.sample("g", kind.law(a)))
        with pyro.plate("data", 2):
            pyro.sample("z", kind.law(b * torch.tensor([1.0, -0.7]) + a * g))

    return model, guide


def local_global_local(kind: Kind) -> Pair:
    """Plate elements that meet in a global site of the guide, and part again."""

    def model() -> None:
        p = parameter("p", 0.3)
        g = kind.number(pyro.sample("g", kind.law(p)))
        with pyro.plate("data", 2):
            z = kind.number(pyro.sample("z", kind.law(p)))
            w = kind.number(pyro.sample("w", kind.law(p * z - g)))
            loc = z * w + g
            pyro.sample("x", dist.Normal(loc, 1.3), obs=torch.tensor([0.8, -0.9]))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        plate = pyro.plate("data", 2)
        with plate:
            z = kind.number(pyro.sample("z", kind.law(a * torch.tensor([1.0, -0.7]))))
        g = kind.number(pyro.sample("g", kind.law(b + z.sum(-1, keepdim=True))))
        with plate:
            pyro.sample("w", kind.law(b * g - a * z))

    return model, guide


def late_global(kind: Kind) -> Pair:
    """Local sites with a global one between them, which the model meets last.

    The term of ``x`` has met no site outside the plate; yet ``w`` carries one element's ``z``
    to the other, since the guide drew ``g`` before it.
    """

    def model() -> None:
        p = parameter("p", 0.3)
        with pyro.plate("data", 2):
            z = kind.number(pyro.sample("z", kind.law(p)))
            w = kind.number(pyro.sample("w", kind.law(p * z)))
            pyro.sample("x", dist.Normal(1.5 * z * w - w, 1.3), obs=torch.tensor([0.8, -0.9]))
        pyro.sample("g", kind.law(p))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        plate = pyro.plate("data", 2)
        with plate:
            z = kind.number(pyro.sample("z", kind.law(a * torch.tensor([1.0, -0.7]))))
        g = kind.number(pyro.sample("g", kind.law(b + 2 * z.sum(-1, keepdim=True))))
        with plate:
            pyro.sample("w", kind.law(b + 2 * g))

    return model, guide


def one_of_two_plates(kind: Kind) -> Pair:
    """Two sites in a plate each, and an observation in both."""

    def model() -> None:
        p = parameter("p", 0.3)
        rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1)
        with rows:
            z = kind.number(pyro.sample("z", kind.law(p)))
        with columns:
            w = kind.number(pyro.sample("w", kind.law(p)))
        with rows, columns:
            obs = torch.tensor([[0.8, -0.9], [0.1, 1.4]])
            pyro.sample("x", dist.Normal(z * w + z, 1.3), obs=obs)

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        with pyro.plate("rows", 2, dim=-2):
            pyro.sample("z", kind.law(a * torch.tensor([[1.0], [-0.7]])))
        with pyro.plate("columns", 2, dim=-1):
            pyro.sample("w", kind.law(b * torch.tensor([1.0, 0.2])))

    return model, guide


def plates_that_share_a_dimension(kind: Kind) -> Pair:
    """Two plates of different size, one after the other, at the same dimension."""

    def model() -> None:
        p = parameter("p", 0.3)
        with pyro.plate("pair", 2, dim=-1):
            z = kind.number(pyro.sample("z", kind.law(p)))
            pyro.sample("x", dist.Normal(z, 1.3), obs=torch.tensor([0.8, -0.9]))
        with pyro.plate("triple", 3, dim=-1):
            w = kind.number(pyro.sample("w", kind.law(-p)))
            pyro.sample("y", dist.Normal(w - p, 0.9), obs=torch.tensor([0.1, 1.4, -0.2]))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        with pyro.plate("pair", 2, dim=-1):
            pyro.sample("z", kind.law(a * torch.tensor([1.0, -0.7])))
        with pyro.plate("triple", 3, dim=-1):
            pyro.sample("w", kind.law(b * torch.tensor([1.0, 0.2, -0.5])))

    return model, guide


def sequential_plate(kind: Kind) -> Pair:
    """A plate that is a loop."""

    def model() -> None:
        p = parameter("p", 0.3)
        for i in pyro.plate("data", 2):
            z = kind.number(pyro.sample(f"z{i}", kind.law(p)))
            pyro.sample(f"x{i}", dist.Normal(1.5 * z, 1.3), obs=torch.tensor(0.8 - i))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        for i in pyro.plate("data", 2):
            pyro.sample(f"z{i}", kind.law(a - i * b))

    return model, guide


def auxiliary(kind: Kind) -> Pair:
    """A site of the guide that the model does not have."""

    def model() -> None:
        p = parameter("p", 0.3)
        z = kind.number(pyro.sample("z", kind.law(p)))
        pyro.sample("x", dist.Normal(1.5 * z - p, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        law = kind.law(a)
        u = kind.number(pyro.sample("u", law, infer={"is_auxiliary": True}))
        pyro.sample("z", kind.law(b + 2 * u))

    return model, guide


def guide_factor(kind: Kind) -> Pair:
    """A factor of the guide, as normalizing flows have it."""

    def model() -> None:
        p = parameter("p", 0.3)
        first = kind.number(pyro.sample("z1", kind.law(p)))
        second = kind.number(pyro.sample("z2", kind.law(p * first)))
        pyro.sample("x", dist.Normal(1.5 * second - p, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        first = kind.number(pyro.sample("z1", kind.law(a)))
        pyro.factor("volume", b * first, has_rsample=True)
        pyro.sample("z2", kind.law(b + a * first))

    return model, guide


def continuous_before(kind: Kind) -> Pair:
    """A reparameterised site before a discrete one."""

    def model() -> None:
        p = parameter("p", 0.3)
        u = pyro.sample("u", dist.Normal(p, 1.2))
        z = kind.number(pyro.sample("z", kind.law(p * u)))
        pyro.sample("x", dist.Normal(z * u - p, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        a, b, s = parameter("a", -0.4), parameter("b", 0.6), parameter("s", -0.2)
        u = pyro.sample("u", dist.Normal(a, s.exp()))
        pyro.sample("z", kind.law(b - u))

    return model, guide


def continuous_between(kind: Kind) -> Pair:
    """A reparameterised site after a discrete one and before another."""

    def model() -> None:
        p = parameter("p", 0.3)
        first = kind.number(pyro.sample("z1", kind.law(p)))
        u = pyro.sample("u", dist.Normal(p * first, 1.2))
        second = kind.number(pyro.sample("z2", kind.law(p * u)))
        loc = first * second * u - p
        pyro.sample("x", dist.Normal(loc, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        a, b, s = parameter("a", -0.4), parameter("b", 0.6), parameter("s", -0.2)
        first = kind.number(pyro.sample("z1", kind.law(a)))
        u = pyro.sample("u", dist.Normal(b * first + a, (s * first).exp()))
        pyro.sample("z2", kind.law(b * u + first))

    return model, guide


def continuous_after(kind: Kind) -> Pair:
    """A reparameterised site after a discrete one, in a plate."""

    def model() -> None:
        p = parameter("p", 0.3)
        with pyro.plate("data", 2):
            z = kind.number(pyro.sample("z", kind.law(p)))
            u = pyro.sample("u", dist.Normal(p * z, 1.2))
            pyro.sample("x", dist.Normal(z * u - p, 1.3), obs=torch.tensor([0.8, -0.9]))

    def guide() -> None:
        a, b, s = parameter("a", -0.4), parameter("b", 0.6), parameter("s", -0.2)
        with pyro.plate("data", 2):
            z = kind.number(pyro.sample("z", kind.law(a * torch.tensor([1.0, -0.7]))))
            pyro.sample("u", dist.Normal(b * z + a, s.exp()))

    return model, guide


def continuous_global(kind: Kind) -> Pair:
    """Local sites, a reparameterised global one that they make, and one more behind it."""

    def model() -> None:
        p = parameter("p", 0.3)
        plate = pyro.plate("data", 2)
        with plate:
            z = kind.number(pyro.sample("z", kind.law(p)))
        u = pyro.sample("u", dist.Normal(p * z.sum(-1, keepdim=True), 1.2))
        w = kind.number(pyro.sample("w", kind.law(p * u)))
        with plate:
            pyro.sample("x", dist.Normal(z * u - w, 1.3), obs=torch.tensor([0.8, -0.9]))

    def guide() -> None:
        a, b, s = parameter("a", -0.4), parameter("b", 0.6), parameter("s", -0.2)
        with pyro.plate("data", 2):
            z = kind.number(pyro.sample("z", kind.law(a * torch.tensor([1.0, -0.7]))))
        u = pyro.sample("u", dist.Normal(b * z.sum(-1, keepdim=True) + a, s.exp()))
        pyro.sample("w", kind.law(b * u))

    return model, guide


def control_flow(kind: Kind) -> Pair:
    """A site that only some values of another bring about. Needs sequential worlds."""

    def model() -> None:
        p = parameter("p", 0.3)
        z = kind.number(pyro.sample("z", kind.law(p)))
        loc = 1.5 * z
        if z.item() > 0:
            loc = loc - 2 * kind.number(pyro.sample("w", kind.law(p * z)))
        pyro.sample("x", dist.Normal(loc, 1.3), obs=torch.tensor(0.8))

    def guide() -> None:
        a, b = parameter("a", -0.4), parameter("b", 0.6)
        z = kind.number(pyro.sample("z", kind.law(a)))
        if z.item() > 0:
            pyro.sample("w", kind.law(b + a * z))

    return model, guide
