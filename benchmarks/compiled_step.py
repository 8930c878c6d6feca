"""What a compiled step of a VAE costs, against the same estimator by hand, Pyro, and Storchastic.

All candidates run interleaved in one process, and ratios are taken inside a round; see
``README.md`` beside this file. Storchastic is measured where it is installed.

    python benchmarks/compiled_step.py
    python benchmarks/compiled_step.py --models linear --batches 50 --estimators REBAR
    python benchmarks/compiled_step.py --device cuda
    python benchmarks/compiled_step.py --smoke
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from _arguments import parsed, timing_parser
from _checks import check_recorded, check_waiting, require
from _hand_checks import check_references
from _hand_vae import TEMPERATURE, HandStep
from _memory import peak_bytes
from _peers import storchastic_step
from _settings import DECAY, GRAPH, LEARNING_RATE, PYRO_AVERAGE, TRACE
from _timing import Step, Times, measure, quiet_machine, ratios, spread
from _vae import LINEAR, NONLINEAR, VAE, vae_batch
from _variance import encoder_variances
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.optim import Adam
from torch import Tensor
from torch._inductor.utils import fresh_cache

from pyro_nondiff.estimators import (
    REBAR,
    REINFORCE,
    RELAX,
    RLOO,
    AbstractEstimator,
    DisARM,
    MovingAverage,
    StraightThrough,
)
from pyro_nondiff.infer import TraceEstimator_ELBO
from pyro_nondiff.infer.capture.backends import Backend
from pyro_nondiff.infer.compiled import CompiledSVI

SIZES = {"linear": LINEAR, "nonlinear": NONLINEAR}
TINY = (784, 8)
CHECKED = (12, 9, 8)

MAKE: dict[str, Callable[[], AbstractEstimator]] = {
    "REINFORCE": lambda: REINFORCE(MovingAverage(DECAY)),
    "RLOO(2)": lambda: RLOO(2),
    "DisARM": DisARM,
    "REBAR": lambda: REBAR(TEMPERATURE),
    "RELAX": lambda: RELAX(temperature=TEMPERATURE),
    "StraightThrough": lambda: StraightThrough("gumbel", temperature=TEMPERATURE),
}
OPTIONS: dict[str, dict[str, Any] | None] = {
    "torch's draws": {"fallback_random": True},
    "inductor's draws": {},
}


@dataclass
class Setting:
    """A model with a batch, and what was measured there.

    Arguments:
        title: Of the tables.
        times: Milliseconds of each candidate.
        hand: For each estimator, the faster of the hand-written candidates.
        first: Seconds until a step is compiled, ours and by hand.
        peaks: Bytes that a step holds, ours and by hand.
    """

    title: str
    times: Times
    hand: dict[str, str]
    first: dict[str, tuple[float, float]] = field(default_factory=dict)
    peaks: dict[str, tuple[int, int]] = field(default_factory=dict)

    def of(self, name: str, to: str) -> list[float] | None:
        """The ratios of two candidates, or None if one was not measured."""
        if name not in self.times or to not in self.times:
            return None
        return ratios(self.times, name, to)


def ours_step(name: str, sizes: tuple[int, ...], x: Tensor, backend: Backend) -> Step:
    """A step of the library."""
    vae = VAE(f"ours {name}", {}, str(x.device), sizes, site=f"z of {name}")
    elbo = TraceEstimator_ELBO(MAKE[name]())
    optim = Adam({"lr": LEARNING_RATE})
    svi = CompiledSVI(vae.model, vae.guide, optim, elbo, backend=backend)
    return lambda: svi.step(x)


def pyro_step(name: str, sizes: tuple[int, ...], x: Tensor) -> Step:
    """A step of Pyro with its default settings, validation among them."""
    vae = VAE(name, PYRO_AVERAGE if name == GRAPH else {}, str(x.device), sizes)
    elbo = TraceGraph_ELBO() if name == GRAPH else Trace_ELBO()
    svi = SVI(vae.model, vae.guide, Adam({"lr": LEARNING_RATE}), elbo)

    def step() -> None:
        with pyro.validation_enabled(True):
            svi.step(x)

    return step


def run_setting(model: str, sizes: tuple[int, ...], size: int, args: argparse.Namespace) -> Setting:
    """Builds and measures all candidates."""
    pyro.clear_param_store()  # Pyro's average has the shape of its batch
    x, source = vae_batch(size, args.device)
    device = args.device
    choices = OPTIONS if args.backend == "inductor" else {"torch's draws": None}
    steps: dict[str, Step] = {}
    setting = Setting(f"{model} VAE, batch {size}, {source}", {}, {})
    for name in args.estimators:
        steps[name] = ours_step(name, sizes, x, args.backend)
        # the first step runs eager, the second is recorded and compiled
        ours, _ = _seconds(lambda name=name: [steps[name]() for _ in range(2)])
        seconds = {}
        for label, options in choices.items():
            vae = VAE("", {}, device, sizes)
            begin = time.perf_counter()
            step = HandStep(name, vae, x, options, LEARNING_RATE)
            step(x)
            seconds[label] = time.perf_counter() - begin
            steps[_hand(name, label)] = lambda step=step: step(x)
        setting.first[name] = ours, seconds["torch's draws"]
        if (peer := storchastic_step(name, VAE("", {}, device, sizes), x)) is not None:
            steps[_peer(name)] = peer
    for name in (GRAPH, TRACE):
        steps[name] = pyro_step(name, sizes, x)
    setting.times = measure(steps, args.rounds, args.seconds, device)
    for name in args.estimators:
        middle = {_hand(name, o): statistics.median(setting.times[_hand(name, o)]) for o in choices}
        setting.hand[name] = min(middle, key=lambda key: middle[key])
        pair = (steps[name], steps[setting.hand[name]])
        ours_peak, hand_peak = (peak_bytes(step, device) for step in pair)
        setting.peaks[name] = ours_peak, hand_peak
    return setting


def _seconds(do: Callable[[], object]) -> tuple[float, object]:
    begin = time.perf_counter()
    found = do()
    return time.perf_counter() - begin, found


def _hand(name: str, label: str) -> str:
    return f"{name} by hand, {label}"


def _peer(name: str) -> str:
    return f"{name} in Storchastic"


# --- tables -------------------------------------------------------------------------------


def _cell(values: list[float] | None) -> str:
    return "" if values is None else spread(values)


def time_table(setting: Setting) -> Iterator[str]:
    """A row an estimator: milliseconds, and ratios to and of ours."""
    yield (
        "| estimator | ours, ms | by hand, ms | ours / by hand | TraceGraph / ours | "
        "Trace / ours | Storchastic / ours | the reference's random numbers |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, hand in setting.hand.items():
        cells = [spread(setting.times[name]), spread(setting.times[hand])]
        cells += [_cell(setting.of(name, hand))]
        cells += [_cell(setting.of(other, name)) for other in (GRAPH, TRACE, _peer(name))]
        yield f"| {name} | {' | '.join(cells)} | {hand.split(', ')[-1]} |"
    yield ""
    middle = {name: spread(setting.times[name]) for name in (GRAPH, TRACE)}
    yield ". ".join(f"{name}: {ms} ms" for name, ms in middle.items()) + "."
    yield f"Geometric mean of ours / by hand: {mean_ratio([setting]):.3f}."


def cost_table(setting: Setting) -> Iterator[str]:
    """Memory, and the time of the first steps."""
    yield (
        "| estimator | peak, ours, MB | by hand, MB | ours / by hand | first two steps, ours, s | "
        "first step by hand, s |"
    )
    yield "|---|---|---|---|---|---|"
    for name, (ours, hand) in setting.peaks.items():
        seconds = " | ".join(f"{s:.1f}" for s in setting.first[name])
        sizes = f"{ours / 1e6:.2f} | {hand / 1e6:.2f} | {ours / hand:.2f}"
        yield f"| {name} | {sizes} | {seconds} |"


def variance_table(variances: dict[str, float], setting: Setting) -> Iterator[str]:
    """The variance of the encoder's gradient at one checkpoint, and the speed beside it."""
    yield "| estimator | variance / TraceGraph + average | TraceGraph + average / ours, time |"
    yield "|---|---|---|"
    for name, value in variances.items():
        yield f"| {name} | {value / variances[GRAPH]:.3g} | {_cell(setting.of(GRAPH, name))} |"


def mean_ratio(settings: list[Setting]) -> float:
    """The geometric mean of the median ratios of ours to the hand-written reference."""
    found = [
        statistics.median(ratios(setting.times, name, hand))
        for setting in settings
        for name, hand in setting.hand.items()
    ]
    return statistics.geometric_mean(found)


def target_table(
    settings: dict[tuple[str, int], Setting], variances: dict[str, dict[str, float]]
) -> Iterator[str]:
    """What was asked for, and what was found."""
    yield "| target | found | limit | met |"
    yield "|---|---|---|---|"
    for key, setting in settings.items():
        where = f"{key[0]}, batch {key[1]}"
        hand = [_middle(setting, n, h) for n, h in setting.hand.items()]
        yield _target(f"{where}: greatest ours / by hand", max(hand), 1.10, False)
        peaks = max(ours / theirs for ours, theirs in setting.peaks.values())
        yield _target(f"{where}: greatest peak memory, ours / by hand", peaks, 1.20, False)
        peers = [_peer(name) for name in setting.hand if _peer(name) in setting.times]
        if peers:
            least = min(_middle(setting, peer, peer.split(" in ")[0]) for peer in peers)
            yield _target(f"{where}: least Storchastic / ours", least, 2.5, True)
        if key[1] == 50:
            found = variances.get(key[0], {})
            better = [n for n in setting.hand if found.get(n, 0) <= found.get(GRAPH, 0)]
            if better:
                best = max(_middle(setting, GRAPH, name) for name in better)
                what = "TraceGraph / ours with no more variance"
                yield _target(f"{where}: greatest {what}", best, 4.0, True)
    yield _target("geometric mean of ours / by hand", mean_ratio([*settings.values()]), 1.05, False)


def _middle(setting: Setting, name: str, to: str) -> float:
    return statistics.median(ratios(setting.times, name, to))


def _target(what: str, found: float, limit: float, at_least: bool) -> str:
    met = found >= limit if at_least else found <= limit
    word = "at least" if at_least else "at most"
    return f"| {what} | {found:.2f} | {word} {limit:.2f} | {'yes' if met else 'no'} |"


# --- the run ------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """What is asked for on the command line."""
    parser = timing_parser(
        "Time a compiled step of a VAE.", "check on a tiny VAE, time nothing", rounds=15
    )
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[50, 500])
    parser.add_argument("--estimators", nargs="+", choices=list(MAKE), default=list(MAKE))
    parser.add_argument("--train", type=int, default=1000, help="steps to the checkpoint; 0: none")
    parser.add_argument(
        "--adapt", type=int, default=400, help="steps of what estimators learn there"
    )
    parser.add_argument("--draws", type=int, default=150, help="of a gradient, for its variance")
    parser.add_argument("--backend", choices=["inductor", "replay"], default="inductor")
    return parsed(parser)


def warm_up(device: str) -> None:
    """Lets inductor prepare what it needs once, so that no candidate pays for it."""
    x = torch.ones(8, device=device)
    torch.compile(lambda x: x.sin().sum())(x)


def smoke(args: argparse.Namespace) -> None:
    """What is exact about a step, on a tiny VAE, and that all tables can be made."""
    x = torch.rand(10, CHECKED[0], device=args.device).round()
    print(check_waiting(partial(_checked, args.estimators[0], args.device), (x,)))
    for name in args.estimators:
        print(f"{name}: {check_recorded(partial(_checked, name, args.device), (x,))}")
    args.rounds, args.seconds, args.train, args.adapt, args.draws = 1, 0.0, 3, 3, 3
    args.backend = "replay"
    settings = {("tiny", size): run_setting("tiny", TINY, size, args) for size in (6, 50)}
    variances = encoder_variances(TINY, _makers(args), PYRO_AVERAGE, GRAPH, args)
    setting = settings["tiny", 50]
    for table in (time_table, cost_table):
        _require_rows(list(table(setting)), args.estimators)
    _require_rows(list(variance_table(variances, setting)), args.estimators)
    _require_rows(list(target_table(settings, {"tiny": variances})), ["tiny, batch 50"])
    print("all tables can be made")


def _checked(name: str, device: str) -> tuple[Any, Any, TraceEstimator_ELBO]:
    """A tiny VAE with one more layer, and an objective."""
    vae = VAE("checked", {}, device, CHECKED)
    return vae.model, vae.guide, TraceEstimator_ELBO(MAKE[name]())


def _makers(args: argparse.Namespace) -> dict[str, Callable[[], AbstractEstimator]]:
    return {name: MAKE[name] for name in args.estimators}


def _require_rows(lines: list[str], names: list[str]) -> None:
    for name in names:
        found = any(line.startswith(f"| {name}") for line in lines)
        require(found, f"a table has no row for {name}: {lines}")


def report(args: argparse.Namespace) -> None:
    """Measures, and prints tables in Markdown."""
    settings: dict[tuple[str, int], Setting] = {}
    variances: dict[str, dict[str, float]] = {}
    for model in args.models:
        for size in args.batches:
            with fresh_cache():
                warm_up(args.device)
                setting = run_setting(model, SIZES[model], size, args)
            settings[model, size] = setting
            for table in (time_table(setting), cost_table(setting)):
                print(f"\n## {setting.title}\n")
                print("\n".join(table), flush=True)
            if size == 50 and args.train:
                found = encoder_variances(SIZES[model], _makers(args), PYRO_AVERAGE, GRAPH, args)
                variances[model] = found
                print(f"\n## {setting.title}: variance after {args.train} steps\n")
                print("\n".join(variance_table(found, setting)), flush=True)
    print("\n## Targets\n")
    print("\n".join(target_table(settings, variances)))


def main() -> None:
    """Checks the references, then measures or, for ``--smoke``, checks the step."""
    args = arguments()
    pyro.set_rng_seed(0)
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, {args.device}, one thread,")
    print(f"{args.rounds} rounds; median (least to greatest).\n", flush=True)
    with quiet_machine():
        print("\n".join(check_references(_makers(args), args.device)), flush=True)
        if args.smoke:
            smoke(args)
        else:
            report(args)


if __name__ == "__main__":
    main()
