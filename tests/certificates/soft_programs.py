"""Programs with relaxable sites, small enough for quadrature: at most two continuous numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

Program = Callable[[], Any]


class SoftPair(NamedTuple):
    """A model and a guide, with the parameters ``a`` of the guide and ``m`` of the model."""

    model: Program
    guide: Program


def a(size: int = 3) -> Tensor:
    return pyro.param("a", torch.tensor([0.3, -0.7, 0.4][:size]))


def m() -> Tensor:
    return pyro.param("m", torch.tensor([0.2, 0.5, -0.4]))


def observe(mean: Tensor) -> None:
    pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.tensor(1.5))


def one_site() -> SoftPair:
    """A product with itself tells a relaxed value from a hard one."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        observe(z * z * m()[0] + 0.6 * z)

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=a()[0]))

    return SoftPair(model, guide)


def shared_logit() -> SoftPair:
    """Two elements of a plate have one logit, and meet in one cost outside the plate."""

    def model() -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(z * z, 1.0), obs=torch.tensor([0.5, -1.0]))
        observe(z.prod(-1, keepdim=True) + m()[0] * z.sum(-1, keepdim=True))

    def guide() -> None:
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=a()[0]))

    return SoftPair(model, guide)


def two_sites() -> SoftPair:
    """The second site depends on the first, in guide and model."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        y = pyro.sample("y", dist.Bernoulli(logits=m()[0] * z))
        observe(z + m()[1] * y + z * y)

    def guide() -> None:
        z = pyro.sample("z", dist.Bernoulli(logits=a()[0]))
        pyro.sample("y", dist.Bernoulli(logits=a()[1] + 0.8 * z))

    return SoftPair(model, guide)


def reversed_model() -> SoftPair:
    """The model meets the second site first."""

    def model() -> None:
        y = pyro.sample("y", dist.Bernoulli(0.6))
        z = pyro.sample("z", dist.Bernoulli(logits=m()[0] * y))
        observe(z + m()[1] * y + z * y)

    return SoftPair(model, two_sites().guide)


def one_hot() -> SoftPair:
    """Three categories, and a cost that is no linear function of them."""

    def model() -> None:
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.3, 0.5, 0.2])))
        observe((z * m()).sum(-1) ** 2 + z[..., 0] * 0.7)

    def guide() -> None:
        pyro.sample("z", dist.OneHotCategorical(logits=a()))

    return SoftPair(model, guide)


def one_hot_then_bernoulli() -> SoftPair:
    def model() -> None:
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.3, 0.5, 0.2])))
        y = pyro.sample("y", dist.Bernoulli(logits=(z * m()).sum(-1)))
        observe((z * m()).sum(-1) ** 2 + z[..., 0] * y)

    def guide() -> None:
        z = pyro.sample("z", dist.OneHotCategorical(logits=a()))
        pyro.sample("y", dist.Bernoulli(logits=z[..., 0] - z[..., 2]))

    return SoftPair(model, guide)


def normal_between() -> SoftPair:
    """A reparameterised site depends on the first discrete one, and the second on it."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        n = pyro.sample("n", dist.Normal(z, 1.0))
        y = pyro.sample("y", dist.Bernoulli(logits=m()[0] * z + n))
        observe(z + m()[1] * y + z * y + 0.3 * n)

    def guide() -> None:
        z = pyro.sample("z", dist.Bernoulli(logits=a()[0]))
        n = pyro.sample("n", dist.Normal(0.8 * z, 0.7))
        pyro.sample("y", dist.Bernoulli(logits=a()[1] - 0.3 * n))

    return SoftPair(model, guide)


def categorical_behind() -> SoftPair:
    """An indexed site that cannot be relaxed, and a term of the model before it."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("early", dist.Normal(1.2 * z * z, 1.0), obs=torch.tensor(1.0))
        logits = torch.stack([m()[0] * z, 1 - z, z * z], -1)
        y = pyro.sample("y", dist.Categorical(logits=logits))
        observe(z + 0.4 * y + z * y)

    def guide() -> None:
        z = pyro.sample("z", dist.Bernoulli(logits=a()[0]))
        pyro.sample("y", dist.Categorical(logits=torch.stack([0.8 * z, a()[1] - z, 0.1 * z], -1)))

    return SoftPair(model, guide)


def masked_plates() -> SoftPair:
    """Nested plates, one subsampled, with a scale and both kinds of mask."""

    def model() -> None:
        keep = torch.tensor([True, False])
        with (
            pyro.plate("outer", 5, subsample=torch.tensor([3]), dim=-2),
            pyro.plate("inner", 2, dim=-1),
            poutine.scale(scale=1.5),
        ):
            z = pyro.sample("z", dist.Bernoulli(torch.full((1, 2), 0.3)).mask(keep))
            with poutine.mask(mask=torch.tensor([[True, True]])):
                law = dist.Normal(z * z * m()[:2] + 0.4 * z, 1.0)
                pyro.sample("x", law, obs=torch.tensor([[0.5, -1.0]]))

    def guide() -> None:
        with (
            pyro.plate("outer", 5, subsample=torch.tensor([3]), dim=-2),
            pyro.plate("inner", 2, dim=-1),
            poutine.mask(mask=torch.tensor([[True, False]])),
        ):
            pyro.sample("z", dist.Bernoulli(logits=a()[:2].expand(1, 2)))

    return SoftPair(model, guide)
