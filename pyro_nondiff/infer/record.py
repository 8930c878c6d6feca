"""Records the sample sites of a run, and gives the model's sites the guide's values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..distributions import Law
from ..errors import NonDiffError
from ..estimators import AbstractEstimator, Ask, Draw
from ..ops._op import IN_WORLDS
from .plan import Plan


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
    correction: Tensor | None = None
    breaks: bool = False
    unserved: bool = False

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
        elif msg["is_observed"]:
            return
        elif msg["value"] is None:
            self.give_value(msg)
            msg[IN_WORLDS] = True
        else:
            self.keep_value(msg)

    def give_value(self, msg: Any) -> None:
        """Sets the value of a latent site."""
        raise NotImplementedError

    def keep_value(self, msg: Any) -> None:
        """Takes note of a latent site whose value comes from a handler inside."""

    def complete(self, site: Site) -> None:
        """Adds to the record of a site what was drawn beside its value."""

    def start_model(self, rows: slice, known: Mapping[str, Site]) -> None:
        """Says that a model is run next, which may ask for values of sites of its own.

        Arguments:
            rows: The rows that the model is run on.
            known: Such sites in the hard rows, if the run is on the soft ones.
        """

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


class ModelWorlds(Recorder):
    """Gives the model's latent sites the guide's values, of its hard or of its soft rows.

    A site that the guide does not have is the model's own: it is drawn from its law there.

    Arguments:
        guide: The recorder of the guide, after its run.
        subsamples: Those of the guide.
        plan: The worlds.
        hard: The recorder of the model on the hard rows, if this one is for the soft rows.
    """

    def __init__(
        self,
        guide: Recorder,
        subsamples: dict[str, Any],
        plan: Plan,
        hard: "ModelWorlds | None" = None,
    ) -> None:
        super().__init__("model", subsamples)
        self.guide = guide
        self.plan = plan
        self.soft = hard is not None
        self.own: dict[str, Site] = {}
        rows = slice(plan.num_hard, plan.num_rows) if self.soft else slice(0, plan.num_hard)
        guide.start_model(rows, {} if hard is None else hard.own)

    def give_value(self, msg: Any) -> None:
        name = msg["name"]
        refuse_enumeration(name, msg["infer"])
        partner = self.guide.sites.get(name)
        if partner is None:
            self.guide.give_value(msg)
        elif partner.observed or partner.auxiliary:
            raise NonDiffError(
                f"site '{name}' is latent in the model, and observed or auxiliary in the guide. "
                "Draw it in the guide, give it another name, or observe it in the model."
            )
        else:
            msg["value"], msg["done"] = self._rows(partner), True

    def keep_value(self, msg: Any) -> None:
        if msg["name"] not in self.guide.sites:
            self.guide.keep_value(msg)

    def record(self, msg: Any) -> None:
        super().record(msg)
        site = self.sites[msg["name"]]
        if site.latent and site.name not in self.guide.sites:
            self.guide.complete(site)
            self.own[site.name] = site

    def _rows(self, partner: Site) -> Tensor:
        value = partner.value
        if self.plan.num_hard == self.plan.num_rows:
            return value
        if value.dim() == self.plan.nesting + 2 + partner.law.event_dim and len(value) > 1:
            value = value[self.plan.num_hard :] if self.soft else value[: self.plan.num_hard]
        return value if self.soft or partner.ask.pathwise else value.detach()


def refuse_enumeration(name: str, infer: Mapping[str, Any]) -> None:
    """Refuses a site that asks Pyro to enumerate it."""
    if infer.get("enumerate"):
        raise NonDiffError(
            f"site '{name}' has infer={{'enumerate': {infer['enumerate']!r}}}, which "
            "TraceEstimator_ELBO does not obey. Choose the estimator Enumerate() for the site in "
            "the guide, or use pyro.infer.TraceEnum_ELBO."
        )
