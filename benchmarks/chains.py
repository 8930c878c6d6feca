"""What a step costs on chains of dependent Bernoulli sites, compiled, against Pyro and by hand.

Hand-written gradients are compared with exact enumeration before anything is timed. See
``README.md`` beside this file.

    python benchmarks/chains.py --rounds 11
    python benchmarks/chains.py --lengths 1 5 10 20 --backends inductor
    python benchmarks/chains.py --smoke
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pyro
import torch
from _arguments import parsed, timing_parser
from _by_hand import step_of
from _chain import Chain
from _chain_by_hand import at_once, by_site, check, reinforce, rloo
from _checks import check_recorded
from _settings import DECAY, GRAPH, LEARNING_RATE, PYRO_AVERAGE, TRACE
from _timing import (
    Step,
    Times,
    cold_compiler,
    cpu_seconds,
    growth,
    measure,
    quiet_machine,
    ratios,
    spread,
)
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.optim import Adam
from torch.distributions import Bernoulli, Normal
from tqdm.auto import tqdm

from pyro_nondiff.estimators import REINFORCE, RLOO, AbstractEstimator, MovingAverage
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.infer.compiled import CompiledSVI

try:
    import storch
except ImportError:
    storch = None

STORCH = "Storchastic, score function + average"
ESTIMATORS: dict[str, Callable[[], AbstractEstimator]] = {
    "RLOO(2)": lambda: RLOO(num_samples=2),
    "REINFORCE + average": lambda: REINFORCE(baseline=MovingAverage(decay=DECAY)),
}
HAND = {by_site: "by hand, site by site", at_once: "by hand, sites at once"}


def hand_steps(length: int, device: str, backend: str) -> Iterator[tuple[str, Callable[[], Step]]]:
    """The hand-written candidates; to make one is to compile it."""
    for estimate, how in HAND.items():
        for name in ESTIMATORS:

            def make(estimate: Callable = estimate, name: str = name) -> Step:
                weights = torch.zeros(2, length, device=device, requires_grad=True)
                if name == "RLOO(2)":
                    return step_of(rloo(estimate, 2), [weights], [], [], LEARNING_RATE, backend)
                average = torch.zeros(length, device=device)
                function = reinforce(estimate, DECAY)
                return step_of(function, [weights], [], [average], LEARNING_RATE, backend)

            yield f"{name}, {how}", make


def storchastic(length: int, device: str) -> Step:
    """One cost for all sites: its time grows faster with a cost a site."""
    weights = torch.zeros(2, length, device=device, requires_grad=True)
    adam = torch.optim.Adam([weights], lr=LEARNING_RATE, fused=True)
    methods = [
        storch.method.ScoreFunction(f"z{t}", n_samples=1, baseline_factory="moving_average")
        for t in range(length)
    ]
    seen = torch.ones((), device=device)
    bernoulli = partial(Bernoulli, validate_args=False)  # values are no tensors

    def step() -> object:
        storch.reset()
        adam.zero_grad()
        z, cost = torch.zeros((), device=device), 0.0
        for method, (slope, offset) in zip(methods, weights.unbind(1), strict=True):
            law = bernoulli(logits=slope * z + offset)
            new = method(law)
            cost = cost + law.log_prob(new) - bernoulli(logits=2 * z - 1).log_prob(new)
            z = new
        storch.add_cost(cost - Normal(z, 1.0, validate_args=False).log_prob(seen), "cost")
        loss = storch.backward()
        adam.step()
        return loss

    return step


def objectives() -> dict[str, Callable[[], ELBO]]:
    """What is compiled."""
    return {
        name: lambda make=make: TraceEstimator_ELBO(make()) for name, make in ESTIMATORS.items()
    }


def all_steps(length: int, args: argparse.Namespace) -> tuple[dict[str, Step], dict[str, float]]:
    """One step of each candidate, and what the first two steps of the compiled ones took."""
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    for name, make in objectives().items():
        for backend in args.backends:
            full = f"{name}, {backend}"
            chain = Chain(full, length, {}, args.device)
            optimiser = Adam({"lr": LEARNING_RATE})
            svi = CompiledSVI(chain.model, chain.guide, optimiser, make(), backend=backend)
            steps[full] = svi.step
            with cold_compiler():
                begin = cpu_seconds()
                for _ in range(2):
                    svi.step()
                first[full] = cpu_seconds() - begin
    for name, elbo in ((TRACE, Trace_ELBO()), (GRAPH, TraceGraph_ELBO())):
        chain = Chain(name, length, PYRO_AVERAGE if name == GRAPH else {}, args.device)
        steps[name] = SVI(chain.model, chain.guide, Adam({"lr": LEARNING_RATE}), loss=elbo).step
    for name, make_step in hand_steps(length, args.device, args.backends[0]):
        begin = cpu_seconds()
        steps[name] = make_step()
        first[name] = cpu_seconds() - begin
    if storch is not None:
        step = storchastic(length, args.device)
        try:
            step()
            steps[STORCH] = step
        except RecursionError:
            print(f"Storchastic fails on {length} sites by a RecursionError.")
    return steps, first


def measure_all(args: argparse.Namespace) -> tuple[dict[int, Times], dict[int, dict[str, float]]]:
    """Chains of all lengths, interleaved in one process."""
    steps: dict[str, Step] = {}
    first: dict[int, dict[str, float]] = {}
    for length in tqdm(args.lengths, desc="compiling"):
        made, first[length] = all_steps(length, args)
        steps |= {f"{length} {name}": step for name, step in made.items()}
    chains: dict[int, Times] = {length: {} for length in args.lengths}
    for key, times in measure(steps, args.rounds, args.seconds, args.device).items():
        length, _, name = key.partition(" ")
        chains[int(length)][name] = times
    return chains, first


def table(lengths: list[int], rows: dict[str, dict[int, str]]) -> Iterator[str]:
    """A row a candidate, a column a length."""
    yield f"| sites | {' | '.join(f'{length}' for length in lengths)} |"
    yield "|---|" + "---|" * len(lengths)
    for name, cells in rows.items():
        yield f"| {name} | {' | '.join(cells.get(length, '') for length in lengths)} |"


def in_rows(
    chains: dict[int, Times], cell: Callable[[Times, str], str]
) -> dict[str, dict[int, str]]:
    """A cell of each candidate and length."""
    rows: dict[str, dict[int, str]] = {}
    for length, times in chains.items():
        for name in times:
            rows.setdefault(name, {})[length] = cell(times, name)
    return rows


def targets(
    chains: dict[int, Times], first: dict[int, dict[str, float]], backend: str
) -> Iterator[str]:
    """What was asked for, and what was found."""
    last = max(chains)
    times = chains[last]
    yield f"| target, {last} sites, {backend} | found | wanted | met |"
    yield "|---|---|---|---|"
    for name in ESTIMATORS:
        ours = f"{name}, {backend}"
        asked = [
            (f"{other} / {ours}", ratios(times, other, ours), least)
            for other, least in ((TRACE, 30), (GRAPH, 500))
        ]
        for what, found, least in asked:
            met = "yes" if statistics.median(found) >= least else "no"
            yield f"| {what} | {spread(found)} | at least {least} | {met} |"
        limits = []
        for how in HAND.values():
            limits.append((f"/ {how}", ratios(times, ours, f"{name}, {how}"), 1.3))
        if len(chains) > 2:
            _, *_, middle, _ = sorted(chains)
            limits.append((f"time a site, / {middle} sites", growth(chains, ours), 1.2))
        for what, found, most in limits:
            met = "yes" if statistics.median(found) <= most else "no"
            yield f"| {ours} {what} | {spread(found)} | at most {most} | {met} |"
        taken = first[last][ours]
        met = "yes" if taken <= 30 else "no"
        yield f"| {ours}: seconds of the first two steps | {taken:.1f} | at most 30 | {met} |"


def smoke(args: argparse.Namespace) -> None:
    """Checks what is exact, and times a chain of two without believing it."""
    for make in objectives().values():

        def parts(make: Callable[[], ELBO] = make) -> tuple[Callable, Callable, ELBO]:
            chain = Chain("chain", 3, {}, args.device)
            return chain.model, chain.guide, make()

        check_recorded(parts, ())
    args.backends, args.lengths, args.rounds, args.seconds = ["replay"], [1, 2, 3], 2, 0.001
    report(args)


def report(args: argparse.Namespace) -> None:
    """Checks, measures, and prints tables in Markdown."""
    for estimate in HAND:
        check(estimate)
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, {args.device}, one thread,")
    print(f"{args.rounds} rounds; median (least to greatest).\n")
    sys.stdout.flush()
    chains, first = measure_all(args)
    print("## Milliseconds a step\n")
    print("\n".join(table(args.lengths, in_rows(chains, lambda t, name: spread(t[name])))))
    for name in ESTIMATORS:
        ours = f"{name}, {args.backends[0]}"
        print(f"\n## Times of a step of {ours}\n")
        rows = in_rows(chains, lambda t, other, ours=ours: spread(ratios(t, other, ours)))
        print("\n".join(table(args.lengths, rows)))
    print("\n## Seconds of compilation, or of the first two steps\n")
    seconds: dict[str, dict[int, str]] = {}
    for length, found in first.items():
        for name, value in found.items():
            seconds.setdefault(name, {})[length] = f"{value:.1f}"
    print("\n".join(table(args.lengths, seconds)))
    print("\n## Targets\n")
    for backend in args.backends:
        print("\n".join(targets(chains, first, backend)), end="\n\n")


def main() -> None:
    """Measure, or check."""
    parser = timing_parser("Time a step on chains of sites.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 5, 10, 20, 50])
    parser.add_argument(
        "--backends", nargs="+", default=["inductor", "replay"], choices=["inductor", "replay"]
    )
    args = parsed(parser)
    pyro.set_rng_seed(0)
    with quiet_machine(validation=True):
        smoke(args) if args.smoke else report(args)


if __name__ == "__main__":
    main()
