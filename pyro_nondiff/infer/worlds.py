"""Runs a guide in worlds: a messenger that draws each site once for all of them.

A value has two dimensions at the left of all plates: rows (the base run and the
branches), then base worlds. Where a value is the same in all of them the dimension has
size 1, and leading dimensions of size 1 are left out, so that a program that needs one
world runs with the shapes that it has under Pyro.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .. import noise as noise_source
from ..distributions import (
    Law,
    dtype_and_device,
    logits,
    noise_kind,
    noise_shape,
    transport,
)
from ..errors import NonDiffError
from ..estimators import AbstractEstimator, Ask, Draw
from .config import choose

Mode = Literal["plain", "expanded", "sequential"]


@dataclass(frozen=True)
class Plan:
    """What worlds a run has.

    Arguments:
        base: The number of base worlds.
        branches: How many rows each branching site has, in the order of their rows.
        nesting: How many plate dimensions lie at the right of the worlds.
        mode: ``"plain"``: one run, values as small as they can be. ``"expanded"``: one
            run, latent values expanded to all worlds. ``"sequential"``: a run a world.
    """

    base: int = 1
    branches: tuple[tuple[str, int], ...] = ()
    nesting: int = 0
    mode: Mode = "plain"

    @property
    def num_rows(self) -> int:
        """The number of rows of a vectorised run: the base run and all branches."""
        return 1 + sum(count for _, count in self.branches)

    def rows_of(self, site: str) -> slice:
        """The rows that branch at a site."""
        start = 1
        for name, count in self.branches:
            if name == site:
                return slice(start, start + count)
            start += count
        return slice(start, start)


@dataclass(frozen=True)
class Branch:
    """One world of a sequential run: the row of ``base`` that branches at ``site``."""

    base: "dict[str, Site]"
    site: str
    row: int


class Frame(NamedTuple):
    """A vectorised plate: Pyro's frame without what the engine does not need."""

    name: str
    dim: int
    size: int


@dataclass(slots=True)
class Site:
    """What a run recorded at one sample site."""

    name: str
    law: Law
    value: Tensor
    scale: Any
    mask: Any
    frames: frozenset[Frame]
    infer: Mapping[str, Any]
    observed: bool
    estimator: AbstractEstimator | None = None
    ask: Ask = field(default_factory=Ask)
    draw: Draw | None = None
    noise: Tensor | None = None

    @property
    def latent(self) -> bool:
        """Whether the site was drawn rather than given."""
        return not self.observed

    @property
    def auxiliary(self) -> bool:
        """Whether the site needs no partner."""
        return bool(self.infer.get("is_auxiliary"))


class Recorder(Messenger):
    """Records the sample sites of a run, and replays the subsamples of an earlier one."""

    def __init__(self, program: str, subsamples: dict[str, Any]) -> None:
        super().__init__()
        self.program = program
        self.sites: dict[str, Site] = {}
        self.subsamples = subsamples

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            if msg["value"] is None and msg["name"] in self.subsamples:
                msg["value"] = self.subsamples[msg["name"]]
                msg["done"] = True
        elif msg["value"] is None and not msg["is_observed"]:
            self.give_value(msg)

    def give_value(self, msg: Any) -> None:
        """Sets the value of a latent site."""
        raise NotImplementedError

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.subsamples[msg["name"]] = msg["value"]
        elif "_deterministic" not in msg["infer"]:
            self.record(msg)

    def record(self, msg: Any) -> None:
        """Keeps what later rooms need of a site."""
        name = msg["name"]
        if name in self.sites:
            raise NonDiffError(
                f"the {self.program} has two sites named '{name}'. Give each its own name."
            )
        self.sites[name] = Site(
            name,
            msg["fn"],
            msg["value"],
            msg["scale"],
            msg["mask"],
            frozenset(
                Frame(frame.name, frame.dim, frame.size)
                for frame in msg["cond_indep_stack"]
                if frame.dim is not None
            ),
            msg["infer"],
            bool(msg["is_observed"]),
        )


class GuideWorlds(Recorder):
    """Draws the guide's sites, with one noise a base world and a value a world."""

    def __init__(
        self,
        plan: Plan,
        default: AbstractEstimator | None,
        subsamples: dict[str, Any],
        branch: Branch | None = None,
    ) -> None:
        super().__init__("guide", subsamples)
        self.plan = plan
        self.default = default
        self.branch = branch
        self._upstream = branch is not None
        self._drawn: tuple[AbstractEstimator, Ask, Draw, Tensor | None] | None = None

    def give_value(self, msg: Any) -> None:
        name, law = msg["name"], msg["fn"]
        _refuse_enumeration(name, msg["infer"])
        estimator = choose(name, law, msg["infer"], self.default)
        ask = estimator.ask(law)
        noise = self._noise(name, law, ask)
        value = self._upstream_value(name)
        draw = Draw(value.unsqueeze(0)) if value is not None else None
        if draw is None:
            value = self._value(law, noise, ask)
            draw = estimator.hard_draw(law, value, noise)
            value = self._spread(law, draw, self.plan.rows_of(name))
        self._drawn = estimator, ask, draw, noise
        msg["value"], msg["done"] = value, True

    def record(self, msg: Any) -> None:
        super().record(msg)
        site = self.sites[msg["name"]]
        if self._drawn is not None:
            site.estimator, site.ask, site.draw, site.noise = self._drawn
            self._drawn = None

    def _upstream_value(self, name: str) -> Tensor | None:
        """In a branch: the base run's value up to the branching site, its row there."""
        if self.branch is None or not self._upstream:
            return None
        site = self.branch.base.get(name)
        if site is None:
            raise NonDiffError(
                f"the guide met site '{name}' in one run and not in another, with all earlier "
                "values the same: it depends on randomness outside sample sites. Draw that at a "
                "sample site, or use an estimator without branches, such as RLOO()."
            )
        if name != self.branch.site:
            return site.value
        self._upstream = False
        return site.draw.values[self.branch.row] if site.draw is not None else None

    def _noise(self, name: str, law: Law, ask: Ask) -> Tensor | None:
        kind = noise_kind(law)
        if kind is None:
            return None
        shape = self._worldly(noise_shape(law), law)
        if self.branch is not None and name in self.branch.base:
            shared = self.branch.base[name].noise
            if shared is not None and shared.shape == shape:
                return shared
        dtype, device = dtype_and_device(law)
        if is_validation_enabled():
            _refuse_nan(name, law)
        request = noise_source.Request(name, kind, tuple(shape), dtype, device, ask.role, law)
        return noise_source.draw(request)

    def _worldly(self, shape: torch.Size, law: Law, rows: bool = False) -> torch.Size:
        """The shape of a law's draws: one for each base world, and for each row if asked."""
        plan = self.plan
        if plan.base == plan.num_rows == 1:
            return shape
        batch = torch.Size(law.batch_shape)
        rest = shape[len(batch) :]
        padded = torch.Size((1,) * (plan.nesting + 2 - len(batch))) + batch
        if padded[0] == 1:
            return shape if plan.base == 1 else torch.Size((plan.base,)) + padded[2:] + rest
        return torch.Size((padded[0] if rows else 1, plan.base)) + padded[2:] + rest

    def _value(self, law: Law, noise: Tensor | None, ask: Ask) -> Tensor:
        if noise is not None:
            value = transport(law, noise)
        else:
            value = self._fresh(law, ask)
        return value if ask.pathwise else value.detach()

    def _fresh(self, law: Law, ask: Ask) -> Tensor:
        """A draw from a law that is no map of noise: afresh in each world."""
        shape = self._worldly(law.batch_shape, law, rows=True)
        if shape != law.batch_shape:
            law = law.expand(shape)
        value: Tensor = law.rsample() if ask.pathwise else law.sample()
        return value

    def _spread(self, law: Law, draw: Draw, rows: slice) -> Tensor:
        """The value of each row: the base value, and in the site's own rows its draws."""
        value = draw.values[0]
        own = rows.stop - rows.start
        expanded = self.plan.mode == "expanded" and self.plan.num_rows * self.plan.base > 1
        if own != len(draw.values) - 1 or (own == 0 and not expanded):
            return value
        rank = self.plan.nesting + 2 + law.event_dim
        value = lift(value, rank)
        inner = value.shape[1:]
        if expanded:
            inner = torch.Size((self.plan.base,)) + inner[1:]
            value = value.expand(-1, *inner)
        all_rows = value.expand(self.plan.num_rows, *inner)
        if own == 0:
            return all_rows
        branches = torch.stack([lift(row, rank)[0] for row in draw.values[1:].unbind()])
        branches = branches.expand(own, *inner)
        return torch.cat([all_rows[: rows.start], branches, all_rows[rows.stop :]])


class ModelWorlds(Recorder):
    """Gives the model's latent sites the guide's values."""

    def __init__(self, guide: Mapping[str, Site], subsamples: dict[str, Any]) -> None:
        super().__init__("model", subsamples)
        self.guide = guide

    def give_value(self, msg: Any) -> None:
        name = msg["name"]
        _refuse_enumeration(name, msg["infer"])
        partner = self.guide.get(name)
        if partner is None or partner.observed or partner.auxiliary:
            raise NonDiffError(
                f"site '{name}' is latent in the model, and the guide does not draw it: the "
                f"guide's sites are {sorted(self.guide)}. Draw it in the guide, or observe it "
                "in the model."
            )
        msg["value"], msg["done"] = partner.value, True


def lift(x: Tensor, rank: int) -> Tensor:
    """Adds dimensions of size 1 at the left, up to a rank."""
    return x.reshape((1,) * (rank - x.dim()) + x.shape) if x.dim() < rank else x


def _refuse_enumeration(name: str, infer: Mapping[str, Any]) -> None:
    if infer.get("enumerate"):
        raise NonDiffError(
            f"site '{name}' has infer={{'enumerate': {infer['enumerate']!r}}}, which "
            "TraceEstimator_ELBO does not obey. Choose the estimator Enumerate() for the site in "
            "the guide, or use pyro.infer.TraceEnum_ELBO."
        )


def _refuse_nan(name: str, law: Law) -> None:
    leaf = logits(law)
    if leaf is not None and not leaf.is_meta and torch.isnan(leaf).any():
        raise NonDiffError(
            f"site '{name}': the logits of its {type(law).__name__} are NaN. Look for a division "
            "by zero or a learning rate that is too large."
        )
