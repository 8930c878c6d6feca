"""Runs a guide and a model together, in one world or in many."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from traceback import extract_tb
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ..distributions import describe, entropy, log_prob
from ..errors import NonDiffError
from ..estimators import AbstractEstimator
from .costs import Term, reaches
from .lines import line, own_line
from .plan import Branches, Plan, lift
from .record import ModelWorlds, Recorder, Site
from .worlds import Branch, GuideWorlds, StateOf

Program = Callable[..., Any]


@dataclass(frozen=True)
class Pair:
    """A model and a guide with their arguments, and how the objective treats them.

    Arguments:
        model: The model.
        guide: The guide.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
        default: The estimator of a site that has no other.
        state_of: What a site's estimator has learnt.
        discount: Of the cost that a site has at later ones.
        bonus: What the entropy of each of the model's own sites is worth, or None.
    """

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    default: AbstractEstimator | None
    state_of: StateOf
    discount: float = 1.0
    bonus: float | Tensor | None = None


@dataclass(frozen=True)
class Run:
    """One run of guide and model: their sites, in the order in which they were met.

    The model runs a second time on the soft rows, if there are any.

    Arguments:
        guide: The guide's sites.
        model: The model's sites.
        own: Those of them that the guide does not have, and that the model draws.
        soft_model: The model's sites in its soft rows.
        subsamples: What plates have drawn.
    """

    guide: dict[str, Site]
    model: dict[str, Site]
    own: dict[str, Site]
    soft_model: dict[str, Site] | None
    subsamples: dict[str, Any]

    @property
    def drawn(self) -> dict[str, Site]:
        """The guide's sites, and behind them the model's own."""
        return self.guide | self.own

    @property
    def nesting(self) -> int:
        """How many plate dimensions the run used."""
        sites = [*self.guide.values(), *self.model.values()]
        return max((-frame.dim for site in sites for frame in site.frames), default=0)

    @property
    def branches(self) -> tuple[Branches, ...]:
        """How many worlds each site asked to branch into."""
        asks = ((site.name, site.ask) for site in self.drawn.values())
        return tuple(
            Branches(name, ask.hard, ask.soft, ask.base_mass, ask.hard_mass)
            for name, ask in asks
            if ask.hard + ask.soft
        )

    @property
    def base(self) -> int:
        """How many base worlds the sites asked for."""
        return max((site.ask.base for site in self.drawn.values()), default=1)


@dataclass(frozen=True)
class Chunk:
    """Base worlds that ran together, with the branches that ran apart from them.

    A vectorised execution is one chunk whose run has all rows; a sequential one has a
    chunk for each base world and a run for each branch.

    Arguments:
        plan: The worlds of the run.
        run: The run.
        terms: Its terms.
        planned: What was to branch, known before the run.
        branches: The branches that ran apart, of each site that the run met.
    """

    plan: Plan
    run: Run
    terms: list[Term]
    planned: tuple[Branches, ...] = ()
    branches: dict[str, list["Chunk"]] = field(default_factory=dict)

    @property
    def sites(self) -> list[Site]:
        """The sites that are drawn, in their order."""
        return list(self.run.drawn.values())


def run_pair(pair: Pair, plan: Plan, branch: Branch | None = None, subsamples: Any = None) -> Run:
    """Runs the guide, and the model with the guide's values."""
    subsamples = {} if subsamples is None else dict(subsamples)
    guide = GuideWorlds(plan, pair.default, pair.state_of, subsamples, branch)
    return run_recorded(pair, guide, subsamples, plan)


def run_recorded(pair: Pair, guide: Recorder, subsamples: dict[str, Any], plan: Plan) -> Run:
    """Runs the guide under a recorder of one's own, and the model with its values."""
    _run(pair.guide, guide, pair)
    model = ModelWorlds(guide, subsamples, plan)
    _run(pair.model, model, pair)
    if not guide.sites and not model.sites:
        raise NonDiffError("guide and model have no sample site, so there is no loss.")
    _check_partners(guide.sites, model.sites)
    soft_sites = None
    if plan.num_rows > plan.num_hard:
        soft = ModelWorlds(guide, subsamples, plan, hard=model)
        _run(pair.model, soft, pair)
        soft_sites = soft.sites
        for name in model.own.keys() & soft.own.keys():
            model.own[name].breaks = soft.own[name].breaks
    return Run(guide.sites, model.sites, model.own, soft_sites, subsamples)


def _run(program: Program, recorder: Recorder, pair: Pair) -> None:
    try:
        with recorder:
            program(*pair.args, **pair.kwargs)
    except NonDiffError:
        raise
    except ValueError as error:
        last = next(reversed(recorder.sites), None)
        frames = extract_tb(error.__traceback__)
        place = own_line(frames) or line(frames[-1])
        after = "before its first site" if last is None else f"after site '{last}'"
        raise NonDiffError(f"the {recorder.program} failed {after}, at {place}: {error}") from error


def _check_partners(guide: dict[str, Site], model: dict[str, Site]) -> None:
    for site in guide.values():
        partner = model.get(site.name)
        if site.observed and not site.law.has_rsample:
            raise NonDiffError(
                f"site '{site.name}' is observed in the guide. Observe it in the model; a "
                "pyro.factor in the guide needs has_rsample=True."
            )
        if site.auxiliary or site.observed or (partner is not None and partner.latent):
            continue
        found = "observes it" if partner is not None else "does not have it"
        raise NonDiffError(
            f"site '{site.name}' is drawn in the guide, and the model {found}: the model's "
            f"latent sites are {sorted(s.name for s in model.values() if s.latent)}. Draw it in "
            'the model too, or mark it with infer={"is_auxiliary": True} in the guide.'
        )


def terms_of(pair: Pair, run: Run, plan: Plan, soft: bool = False) -> list[Term]:
    """All terms of the objective, in worlds and plates.

    Arguments:
        pair: The programs.
        run: A run of them.
        plan: Its worlds.
        soft: Whether the run is one soft world.
    """
    reach = reaches(list(run.drawn.values()), list(run.model.values()))
    guide = [_guide_term(site, i, plan, soft) for i, site in enumerate(run.guide.values())]
    own = [_own_term(site, reach[site.name], plan, soft) for site in run.own.values()]
    given = (site for site in run.model.values() if site.name not in run.own)
    model = [_model_term(site, reach[site.name], run, plan, soft) for site in given]
    if pair.bonus is None:
        return guide + own + model
    bonuses = [
        _bonus_term(site, reach[site.name] - 1, run, plan, pair.bonus, soft)
        for site in run.own.values()
    ]
    return guide + own + model + bonuses


def _guide_term(site: Site, place: int, plan: Plan, soft: bool) -> Term:
    rows = plan.num_rows
    score, value = _scored(site, plan, soft or rows > plan.num_hard, rows)
    if soft:
        return Term(site, value, score, place, True, value)
    if rows == plan.num_hard:
        return Term(site, value, score, place, True)
    if len(value) == 1:
        return Term(site, value, score, place, True, value)
    hard = slice(None, plan.num_hard)
    return Term(site, value[hard], score[hard], place, True, value[plan.num_hard :])


def _own_term(site: Site, place: int, plan: Plan, soft: bool) -> Term:
    """The term of a site that the model alone draws: zero, since its two terms cancel."""
    score, value = _scored(site, plan, soft, plan.num_hard)
    nothing = value.new_zeros((1,) * value.dim())
    has_soft = soft or plan.num_rows > plan.num_hard
    return Term(site, nothing, score, place, True, nothing if has_soft else None)


def _bonus_term(
    site: Site, reach: int, run: Run, plan: Plan, bonus: float | Tensor, soft: bool
) -> Term:
    """The entropy of a site's law, which the sites before it decide."""
    value = bonus * _entropy(site, plan)
    soft_value = value if soft else None
    if run.soft_model is not None:
        soft_value = bonus * _entropy(run.soft_model[site.name], plan)
    return Term(site, value, value, reach, False, soft_value)


def _entropy(site: Site, plan: Plan) -> Tensor:
    try:
        found = entropy(site.law)
    except NotImplementedError as error:
        raise NonDiffError(
            f"site '{site.name}': its law {describe(site.law)} has no entropy to give a bonus for. "
            "Use entropy_bonus=0, and add a cost of your own."
        ) from error
    return lift(scale_and_mask(found, site.scale, site.mask), plan.nesting + 2)


def _model_term(site: Site, reach: int, run: Run, plan: Plan, soft: bool) -> Term:
    score, value = _scored(site, plan, soft, plan.num_hard)
    if soft:
        return Term(site, value, score, reach, False, value)
    soft_value = None
    if run.soft_model is not None:
        twin = run.soft_model.get(site.name)
        if twin is None:
            raise NonDiffError(
                f"site '{site.name}' of the model is not met in its soft worlds: the model's "
                "sites depend on values. Use an estimator without soft worlds, such as RLOO()."
            )
        _, soft_value = _scored(twin, plan, True, plan.num_rows - plan.num_hard)
    return Term(site, value, score, reach, False, soft_value)


def _scored(site: Site, plan: Plan, soft: bool, rows: int) -> tuple[Tensor, Tensor]:
    """A site's log-probability, and the same scaled and masked, with all dimensions."""
    score, masked = log_prob(site.law, site.value, soft)
    if not masked.is_floating_point():  # a factor of counts, say
        score, masked = (x.to(torch.get_default_dtype()) for x in (score, masked))
    value = lift(scale_and_mask(masked, site.scale, site.mask), plan.nesting + 2)
    _check_shape(site, value, plan, rows)
    return lift(score, plan.nesting + 2), value


def _check_shape(site: Site, value: Tensor, plan: Plan, rows: int) -> None:
    """Every dimension of a term must be declared: a world or a plate."""
    declared = {frame.dim for frame in site.frames}
    rank = plan.nesting + 2
    worlds = {-rank: rows, 1 - rank: plan.base}
    for dim in range(-value.dim(), 0):
        size = value.shape[dim]
        if size == 1 or dim in declared or worlds.get(dim) == size:
            continue
        raise NonDiffError(
            f"site '{site.name}' has batch shape {tuple(site.law.batch_shape)} with size {size} "
            f"at dimension {dim}, which no plate declares. Add .to_event() to the law, or draw "
            "it inside a plate."
        )


def execute(pair: Pair, plan: Plan, estimating: bool) -> list[Chunk]:
    """All worlds of a step, as the plan has them.

    Base worlds that run alone take their branches with them, planned or not: a run is never
    thrown away for what it has met, which would change the law of the others.
    """
    if plan.single or plan.mode == "sequential":
        return list(_sequential(pair, plan, estimating))
    run = run_pair(pair, plan)
    terms = terms_of(pair, run, plan) if run.nesting <= plan.nesting else []
    return [Chunk(plan, run, terms, plan.branches)]


def _sequential(pair: Pair, plan: Plan, estimating: bool) -> Iterator[Chunk]:
    """One run a world."""
    subsamples: dict[str, Any] = {}
    for _ in range(plan.base):
        run = run_pair(pair, Plan(nesting=plan.nesting), subsamples=subsamples)
        subsamples = run.subsamples
        yield alone(pair, run, plan, estimating)


def alone(pair: Pair, run: Run, step: Plan, estimating: bool) -> Chunk:
    """A run of one world of a step, with its branches run apart."""
    plan = Plan(nesting=max(step.nesting, run.nesting))
    branches = {
        at.site: [_branch(pair, plan, run, at.site, 1 + row) for row in range(at.hard + at.soft)]
        for at in (run.branches if estimating else ())
    }
    return Chunk(plan, run, terms_of(pair, run, plan), step.branches, branches)


def _branch(pair: Pair, plan: Plan, base: Run, site: str, row: int) -> Chunk:
    branch = Branch(base.drawn, site, row)
    run = run_pair(pair, plan, branch, base.subsamples)
    return Chunk(plan, run, terms_of(pair, run, plan, soft=branch.soft))


def sites_of(chunks: Sequence[Chunk]) -> list[str]:
    """The names of the sites that are drawn, in the order of their first meeting."""
    return list(dict.fromkeys(name for chunk in chunks for name in chunk.run.drawn))
