"""Draws a guide's sites once for all worlds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from .. import noise as noise_source
from ..distributions import (
    Law,
    base_row,
    conditional,
    continuous,
    dtype_and_device,
    logits,
    noise_concentration,
    noise_kind,
    noise_shape,
    relax,
    relaxable,
    score_correction,
    transport,
    wide_logits,
)
from ..errors import NonDiffError
from ..estimators import AbstractEstimator, Ask, Auto, Draw
from .config import KEY, choose
from .plan import Plan, lift, lift_behind
from .record import Recorder, Site, refuse_enumeration


@dataclass(frozen=True)
class Branch:
    """One world of a sequential run: the row of ``base`` that branches at ``site``."""

    base: "dict[str, Site]"
    site: str
    row: int

    @property
    def soft(self) -> bool:
        """Whether the world is soft."""
        return self.row > self.base[self.site].ask.hard

    @property
    def temperature(self) -> Tensor | None:
        """The temperature behind the site, if the world is soft."""
        draw = self.base[self.site].draw
        return draw.temperature if self.soft and draw is not None else None


StateOf = Callable[[str, AbstractEstimator, Law], nn.Module | None]


class GuideWorlds(Recorder):
    """Draws the guide's sites, with one noise a base world and a value a world.

    It draws the model's own sites too, in the rows that the model is run on.
    """

    def __init__(
        self,
        plan: Plan,
        default: AbstractEstimator | None,
        state_of: StateOf,
        subsamples: dict[str, Any],
        branch: Branch | None = None,
    ) -> None:
        super().__init__("guide", subsamples)
        self.plan = plan
        self.default = default
        self.state_of = state_of
        self.branch = branch
        self._upstream = branch is not None
        self._temperatures: list[Tensor] = []
        self._guide_temperatures: list[Tensor] | None = None
        self._rows = slice(0, plan.num_rows)
        self._known: Mapping[str, Site] = {}
        self._drawn: dict[str, Any] = {}

    @property
    def _has_soft(self) -> bool:
        """Whether there are soft rows among those of the run."""
        return self._rows.stop > self.plan.num_hard

    def start_model(self, rows: slice, known: Mapping[str, Site]) -> None:
        if self._guide_temperatures is None:
            self._guide_temperatures = self._temperatures
        self._temperatures = list(self._guide_temperatures)
        self._rows, self._known = rows, known

    def give_value(self, msg: Any) -> None:
        name, law = msg["name"], msg["fn"]
        refuse_enumeration(name, msg["infer"])
        estimator = choose(name, law, msg["infer"], self.default)
        ask = estimator.ask(law)
        self._drawn = {"estimator": estimator, "ask": ask}
        value = self._upstream_value(name)
        msg["value"] = self._draw(name, law) if value is None else value
        msg["done"] = True

    def keep_value(self, msg: Any) -> None:
        name, law, value = msg["name"], msg["fn"], msg["value"]
        chosen = KEY in msg["infer"] or not law.has_rsample
        infer = msg["infer"] if chosen else {**msg["infer"], KEY: self.default or Auto()}
        estimator = choose(name, law, infer, self.default)
        ask = estimator.ask(law)
        second = ask.second and relaxable(law)
        more = ask.base > 1 or ask.hard or ask.soft or ask.pathwise or (ask.draws and not second)
        if more:  # no matter where the loss alone is wanted
            ask = Ask()
        draw = Draw(value.unsqueeze(0))
        self._drawn = {"estimator": estimator, "ask": ask, "draw": draw, "unserved": bool(more)}
        if second and not more and self.branch is None:
            noise = self._noise_given(name, law, value)
            state = self.state_of(name, estimator, law)
            second_noise = self._noise(name, law, "v")
            self._drawn["draw"] = estimator.draw(law, value, noise, second_noise, state)

    def _noise_given(self, name: str, law: Law, value: Tensor) -> Tensor | None:
        """Noise that makes a value which was given."""
        fresh, leaf = self._noise(name, law, "given"), wide_logits(law).detach()
        return None if fresh is None else conditional(law, leaf, value, fresh) - leaf

    def record(self, msg: Any) -> None:
        super().record(msg)
        self.complete(self.sites[msg["name"]])

    def complete(self, site: Site) -> None:
        for field_name, value in self._drawn.items():
            setattr(site, field_name, value)
        self._drawn = {}

    def _upstream_value(self, name: str) -> Tensor | None:
        """In a branch: the base run's value up to the branching site, its row there."""
        if self.branch is None or not self._upstream:
            return None
        site = self.branch.base.get(name)
        if site is None:
            raise NonDiffError(
                f"the program met site '{name}' in one run and not in another, with all earlier "
                "values the same: it depends on randomness outside sample sites. Draw that at a "
                "sample site, or use an estimator without branches, such as RLOO()."
            )
        if name != self.branch.site:
            return site.value
        self._upstream = False
        return site.draw.values[self.branch.row] if site.draw is not None else None

    def _draw(self, name: str, law: Law) -> Tensor:
        """Draws a site: its noise, its value in all rows, and what its estimator adds."""
        ask: Ask = self._drawn["ask"]
        law = self._drawn["estimator"].drawn_from(law)
        noise = self._noise(name, law, ask.role)
        known = self._known.get(name)
        if noise is None and known is not None and known.draw is not None and self._alike(law):
            value = known.draw.values[0]
        else:
            value = self._values(law, noise, ask)
        rank = self.plan.nesting + 2
        single = self.plan.num_rows == 1 or value.dim() < rank + law.event_dim
        draw = Draw((value if single else value[:1]).unsqueeze(0))
        if known is not None and known.draw is not None:
            draw = known.draw
        elif ask.draws and self.branch is None:
            estimator: AbstractEstimator = self._drawn["estimator"]
            state = self.state_of(name, estimator, law) if ask.second else None
            second = self._noise(name, law, "v", ask.second_kind) if ask.second else None
            if second is not None and not single:
                second = second[:1]
            own = noise if noise is None or single else noise[:1]
            base = law if single else base_row(law, rank)
            draw = estimator.draw(base, draw.values[0], own, second, state)
        self._drawn |= {"draw": draw, "noise": noise}
        return self._spread(name, law, value, draw)

    def _noise(self, name: str, law: Law, role: str, kind: str | None = None) -> Tensor | None:
        kind = kind or noise_kind(law)
        if kind is None:
            return None
        shape = self._worldly(noise_shape(law), law)
        concentration = noise_concentration(law) if kind == "gamma" else None
        if concentration is not None and not _fits(concentration, shape):
            return None  # it differs between rows, which can share no noise then
        shared = self._shared_noise(name, concentration)
        if shared is not None and lift(shared, len(shape)).shape == shape:
            return lift(shared, len(shape))
        dtype, device = dtype_and_device(law)
        if is_validation_enabled():
            _refuse_nan(name, law)
        place = tuple(shape), dtype, device
        request = noise_source.Request(name, kind, *place, role, law, concentration)
        return noise_source.draw(request)

    def _shared_noise(self, name: str, concentration: Tensor | None) -> Tensor | None:
        """The noise that a site has had in the run which this one branches from, or completes."""
        before = self._known if self.branch is None else self.branch.base
        site = before.get(name)
        if site is None or site.noise is None:
            return None
        if self.branch is not None and concentration is not None:
            had = noise_concentration(site.law)
            if had is None or not torch.equal(had, concentration):
                return None  # noise of another law
        return site.noise

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

    def _values(self, law: Law, noise: Tensor | None, ask: Ask) -> Tensor:
        """The value in each row that there is: relaxed behind the owner of a soft row."""
        if noise is None:
            return self._fresh(law, ask)
        value = transport(law, noise)
        if self.branch is not None and self.branch.temperature is not None:
            return self._soft_values(law, noise, value, self.branch.temperature, None)
        rows = value.dim() - law.event_dim == self.plan.nesting + 2 and value.shape[0] > 1
        if not rows or not self._temperatures or not self._has_soft:
            return value if ask.pathwise else value.detach()
        start = self.plan.num_hard - self._rows.start
        stop = start + sum(len(each) for each in self._temperatures)
        behind = [1] * (value.dim() - 1)
        temperature = torch.cat(self._temperatures).reshape(-1, *behind)
        soft = self._soft_values(law, noise, value, temperature, slice(start, stop))
        hard = value if ask.pathwise else value.detach()
        return torch.cat([hard[:start], soft, hard[stop:]])

    def _soft_values(
        self,
        law: Law,
        noise: Tensor,
        value: Tensor,
        temperature: Tensor,
        rows: slice | None,
    ) -> Tensor:
        """The values of soft rows: continuous in the soft values before them if they can be."""
        if relaxable(law):
            perturbed = wide_logits(law) + noise
            soft = relax(law, perturbed if rows is None else perturbed[rows], temperature)
            return soft.to(value.dtype)
        if not continuous(law):
            self._drawn["breaks"] = True
        return value if rows is None else value[rows]

    def _alike(self, law: Law) -> bool:
        """Whether a law is the same in all rows."""
        return len(law.batch_shape) < self.plan.nesting + 2 or law.batch_shape[0] == 1

    def _fresh(self, law: Law, ask: Ask) -> Tensor:
        """A draw from a law that is no map of noise: afresh in each world."""
        shape = self._worldly(law.batch_shape, law, rows=True)
        shape = torch.Size((1,) * (len(law.batch_shape) - len(shape))) + shape
        if shape != law.batch_shape:
            law = law.expand(shape)
        soft_branch = self.branch is not None and self.branch.temperature is not None
        soft_rows = not self._alike(law) and self._has_soft and bool(self._temperatures)
        self._drawn["breaks"] = soft_rows or soft_branch
        value: Tensor = law.rsample() if ask.pathwise else law.sample()
        if ask.corrected:
            self._drawn["correction"] = score_correction(law, value)
        return value

    def _spread(self, name: str, law: Law, value: Tensor, draw: Draw) -> Tensor:
        """The value of each row, with the site's own worlds in the site's own rows."""
        hard, soft = self.plan.rows_of(name)
        own = (hard.stop - hard.start, soft.stop - soft.start)
        ask: Ask = self._drawn["ask"]
        expanded = self.plan.mode == "expanded" and self.plan.num_rows * self.plan.base > 1
        if own != (ask.hard, ask.soft) or (own == (0, 0) and not expanded):
            return value
        rank = self.plan.nesting + 2 + law.event_dim
        value = lift(value, rank)
        inner = value.shape[1:]
        if expanded:
            inner = torch.Size((self.plan.base,)) + inner[1:]
            value = value.expand(-1, *inner)
        rows = value.expand(self._rows.stop - self._rows.start, *inner)
        if own == (0, 0):
            return rows
        branches = lift_behind(draw.values[1:], rank)[:, 0].expand(-1, *inner)
        if draw.temperature is not None and ask.soft:
            self._temperatures.append(draw.temperature.expand(ask.soft))
        all_rows = range(self._rows.start, self._rows.stop)
        if hard.start in all_rows:
            rows = _placed(rows, branches[: ask.hard], hard.start - self._rows.start)
        if soft.start in all_rows:
            rows = _placed(rows, branches[ask.hard :], soft.start - self._rows.start)
        return rows


def _placed(rows: Tensor, own: Tensor, start: int) -> Tensor:
    """Rows with some of them replaced."""
    if not len(own):
        return rows
    return torch.cat([rows[:start], own, rows[start + len(own) :]])


def _fits(concentration: Tensor, shape: torch.Size) -> bool:
    return bool(torch.broadcast_shapes(concentration.shape, shape) == shape)


def _refuse_nan(name: str, law: Law) -> None:
    leaf = logits(law)
    if leaf is not None and not leaf.is_meta and torch.isnan(leaf).any():
        raise NonDiffError(
            f"site '{name}': the logits of its {type(law).__name__} are NaN. Look for a division "
            "by zero or a learning rate that is too large."
        )
