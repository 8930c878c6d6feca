"""What one step of training costs, against Pyro's own objectives and hand-written code.

All candidates run interleaved in one process: a round times each of them once, in random order, and
a ratio is taken inside a round, so that a busy machine slows both sides of it. See ``README.md``
beside this file.

    python benchmarks/svi_step.py --rounds 15
    python benchmarks/svi_step.py --device cuda --only vae
    python benchmarks/svi_step.py --no-optimiser              # the objective alone
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from _arguments import parsed, timing_parser
from _chain import Chain
from _settings import DECAY, GRAPH, LEARNING_RATE, PYRO_AVERAGE, TRACE
from _timing import (
    Step,
    Times,
    growth,
    measure,
    quiet_machine,
    ratio_table,
    ratios,
    spread,
)
from _vae import VAE, vae_batch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.optim import Adam, PyroOptim
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pyro_nondiff.estimators import REINFORCE, RLOO, DisARM, MovingAverage
from pyro_nondiff.infer import TraceEstimator_ELBO

HAND = "hand-written PyTorch, REINFORCE + average"
TRACE_2 = "Pyro Trace_ELBO, 2 vectorised particles"
OURS = "REINFORCE + MovingAverage"
RLOO_2 = "RLOO(2)"
DISARM = "DisARM"


class NoOptimiser(PyroOptim):
    """Leaves parameters alone, so that what is left of a step is its objective."""

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


def optimiser(used: bool) -> PyroOptim:
    """Pyro's Adam, or none."""
    options = {"lr": LEARNING_RATE}
    return Adam(options) if used else NoOptimiser(torch.optim.Adam, options)


# --- the variational autoencoder ----------------------------------------------------------


def by_hand(vae: VAE, x: Tensor, optimise: bool) -> Step:
    """The same step with no library but PyTorch."""
    parameters = [*vae.encoder.parameters(), *vae.decoder.parameters()]
    adam = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    average = torch.zeros((), device=x.device)

    def step() -> float:
        logits = vae.encoder(x)
        z = torch.bernoulli(logits.detach().sigmoid())
        log_q = _bernoulli(logits, z)
        log_p = _bernoulli(vae.decoder(z), x) + _bernoulli(vae.prior.expand_as(z), z)
        cost = (log_q - log_p).detach()
        surrogate = ((cost - average) * log_q - log_p).sum()
        adam.zero_grad()
        surrogate.backward()
        if optimise:
            adam.step()
        average.lerp_(cost.mean(), 1 - DECAY)
        return cost.sum().item()

    return step


def _bernoulli(logits: Tensor, value: Tensor) -> Tensor:
    return -binary_cross_entropy_with_logits(logits, value, reduction="none").sum(-1)


def vae_steps(x: Tensor, optimise: bool = True) -> dict[str, Step]:
    """One step of each candidate on a batch."""
    objectives = {
        TRACE: Trace_ELBO(),
        GRAPH: TraceGraph_ELBO(),
        TRACE_2: Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
        OURS: TraceEstimator_ELBO(REINFORCE(baseline=MovingAverage(decay=DECAY))),
        RLOO_2: TraceEstimator_ELBO(RLOO(num_samples=2)),
        DISARM: TraceEstimator_ELBO(DisARM()),
    }
    device = str(x.device)
    steps: dict[str, Step] = {HAND: by_hand(VAE(HAND, {}, device), x, optimise)}
    for name, elbo in objectives.items():
        vae = VAE(name, PYRO_AVERAGE if name == GRAPH else {}, device)
        svi = SVI(vae.model, vae.guide, optimiser(optimise), loss=elbo)
        steps[name] = lambda svi=svi: svi.step(x)
    return steps


# --- chains of dependent sites ------------------------------------------------------------


def chain_steps(length: int, device: str, optimise: bool = True) -> dict[str, Step]:
    """One step of each candidate on a chain."""
    objectives = {
        TRACE: Trace_ELBO(max_plate_nesting=0),
        OURS: TraceEstimator_ELBO(REINFORCE(baseline=MovingAverage(decay=DECAY))),
        RLOO_2: TraceEstimator_ELBO(RLOO(num_samples=2)),
    }
    if length <= 20:  # its time grows faster than the chain
        objectives[GRAPH] = TraceGraph_ELBO()
    steps: dict[str, Step] = {}
    for name, elbo in objectives.items():
        chain = Chain(name, length, PYRO_AVERAGE if name == GRAPH else {}, device)
        steps[name] = SVI(chain.model, chain.guide, optimiser(optimise), loss=elbo).step
    return steps


# --- measuring ----------------------------------------------------------------------------


def measure_chains(args: argparse.Namespace, optimise: bool) -> dict[int, Times]:
    """Chains of all lengths, interleaved like everything else."""
    steps = {
        f"{length} {name}": step
        for length in args.lengths
        for name, step in chain_steps(length, args.device, optimise).items()
    }
    chains: dict[int, Times] = {length: {} for length in args.lengths}
    for key, times in measure(steps, args.rounds, args.seconds, args.device).items():
        length, _, name = key.partition(" ")
        chains[int(length)][name] = times
    return chains


def chain_table(all_times: dict[int, Times]) -> Iterator[str]:
    """A row a length: milliseconds of each candidate, and ratios to ``Trace_ELBO``."""
    names = [OURS, RLOO_2, GRAPH]
    yield f"| sites | {TRACE}, ms | {' | '.join(f'{n}, ms | / {TRACE}' for n in names)} |"
    yield "|---|---|" + "---|---|" * len(names)
    for length, times in all_times.items():
        cells = [f"{length}", spread(times[TRACE])]
        for name in names:
            found = name in times
            cells.append(spread(times[name]) if found else "")
            cells.append(spread(ratios(times, name, TRACE)) if found else "")
        yield f"| {' | '.join(cells)} |"


def targets(vae: Times, chains: dict[int, Times]) -> Iterator[str]:
    """What was asked for, and what was found."""
    asked = []
    if vae:
        pairs = [(OURS, TRACE, 1.15), (OURS, GRAPH, 0.5), (RLOO_2, TRACE_2, 1.2)]
        pairs.append((DISARM, TRACE_2, 1.2))
        asked += [(f"{a} / {b}", ratios(vae, a, b), limit) for a, b, limit in pairs]
    if len(chains) > 2:
        _, *_, middle, last = sorted(chains)
        what = f"time a site, {last} sites / {middle}"
        asked += [(f"{name}: {what}", growth(chains, name), 1.2) for name in (OURS, RLOO_2)]
    yield "| target | found | at most | met |"
    yield "|---|---|---|---|"
    for what, found, limit in asked:
        met = "yes" if statistics.median(found) <= limit else "no"
        yield f"| {what} | {spread(found)} | {limit:.2f} | {met} |"


def arguments() -> argparse.Namespace:
    """What is asked for on the command line."""
    parser = timing_parser("Time a step of training.", "short, and check that all train")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 5, 10, 20, 50])
    parser.add_argument(
        "--no-optimiser", action="store_true", help="time the objective and its gradient alone"
    )
    parser.add_argument("--only", choices=["vae", "chains"])
    args = parsed(parser)
    if args.smoke:
        args.rounds, args.seconds, args.lengths = 1, 0.0, [1, 2, 3]
    return args


def check_trained() -> None:
    """Every candidate has moved every parameter of its chain, from zero to finite numbers."""
    weights = {n: p.detach() for n, p in pyro.get_param_store().items() if n[-2:] in (".1", ".2")}
    for name, value in weights.items():
        if not (value.isfinite().all() and (value[1] != 0).all()):
            raise RuntimeError(f"{name} was not trained: {value}")


def main() -> None:
    """Measure, and print tables in Markdown."""
    args = arguments()
    pyro.set_rng_seed(0)
    optimise = not args.no_optimiser
    vae: Times = {}
    chains: dict[int, Times] = {}
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, {args.device}, one thread,")
    print(f"validation off, {args.rounds} rounds; median (least to greatest).")
    what = "the objective, its gradient, and Adam" if optimise else "the objective and its gradient"
    print(f"A step is {what}.")
    sys.stdout.flush()
    with quiet_machine():
        if args.only != "chains":
            x, source = vae_batch(args.batch, args.device)
            vae = measure(vae_steps(x, optimise), args.rounds, args.seconds, args.device)
            print(f"\n## VAE 784-200-784, batch {args.batch}, {source}\n")
            print("\n".join(ratio_table(vae, [HAND, TRACE, GRAPH, TRACE_2])), flush=True)
        if args.only != "vae":
            chains = measure_chains(args, optimise)
            print("\n## Chains of dependent Bernoulli sites\n")
            print("\n".join(chain_table(chains)))
    if args.smoke:
        check_trained()
    print("\n## Targets\n")
    print("\n".join(targets(vae, chains)))


if __name__ == "__main__":
    main()
