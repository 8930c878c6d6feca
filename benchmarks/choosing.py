"""What to choose an estimator by: bias, variance, runs and milliseconds, at one place of one VAE.

The table of the docs' page "Choosing an estimator". A linear Bernoulli VAE of 200 bits is trained
for a while and held fixed; each estimator learns there what it learns; then its gradient of the
encoder is drawn many times, and its step is timed, eager and compiled, all of them interleaved.

    python benchmarks/choosing.py
    python benchmarks/choosing.py --draws 400 --rounds 11
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from _arguments import parsed, timing_parser
from _checks import require
from _settings import LEARNING_RATE
from _timing import Step, measure, quiet_machine, ratios
from _vae import LINEAR, VAE, vae_batch
from _variance import BATCH, adapt, checkpoint, encoder_gradient, moments
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor, nn
from tqdm import tqdm

from pyro_nondiff.estimators import (
    REBAR,
    REINFORCE,
    RELAX,
    RLOO,
    AbstractEstimator,
    DisARM,
    MovingAverage,
    NeuralBaseline,
    StraightThrough,
)
from pyro_nondiff.infer import CompiledSVI, TraceEstimator_ELBO

REFERENCE = "RLOO(4)"


def neural_baseline() -> AbstractEstimator:
    """A network of the pixels that guesses the cost, on top of its running mean."""
    net = nn.Sequential(nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, 1))
    return REINFORCE(NeuralBaseline(net, input=lambda x: x, centre=True, normalise=True))


MAKE: dict[str, Callable[[], AbstractEstimator]] = {
    "REINFORCE()": REINFORCE,
    "REINFORCE(MovingAverage())": lambda: REINFORCE(MovingAverage()),
    "REINFORCE(NeuralBaseline(...))": neural_baseline,
    "RELAX(relaxed_cost=False)": lambda: RELAX(relaxed_cost=False),
    "RLOO(2)": lambda: RLOO(2),
    "RLOO(4)": lambda: RLOO(4),
    "DisARM()": DisARM,
    "REBAR(temperature=0.1)": lambda: REBAR(temperature=0.1),
    "RELAX(temperature=0.1)": lambda: RELAX(temperature=0.1),
    'StraightThrough("gumbel")': lambda: StraightThrough("gumbel", temperature=0.5),
    'StraightThrough("reinmax")': lambda: StraightThrough("reinmax"),
}
BIASED = ("StraightThrough",)


@dataclass(frozen=True)
class Found:
    """What one estimator's gradient is like.

    Arguments:
        mean: Over the draws, elementwise.
        variance: Over the draws, elementwise.
        rows: Runs of the program a step, of which ``soft`` are relaxed.
        soft: Of them.
    """

    mean: Tensor
    variance: Tensor
    rows: int
    soft: int


def look(
    name: str, trained: VAE, images: Tensor, args: argparse.Namespace
) -> tuple[Found, dict[str, Step]]:
    """Draws one estimator's gradient, and makes its steps."""
    vae = VAE(name, {}, args.device, args.sizes, site=f"z of {name}")
    vae.copy_weights(trained)
    elbo, batch = TraceEstimator_ELBO(MAKE[name]()), images[:BATCH]
    adapt(elbo, vae, images, args.adapt)
    mean, variance = moments(encoder_gradient(elbo, vae, batch), args.draws)
    plan = elbo.plan_of(vae.model, vae.guide, batch)
    soft = sum(branches.soft for branches in plan.branches)
    steps: dict[str, Step] = {}
    for kind, make in (("eager", SVI), ("compiled", partial(CompiledSVI, backend=args.backend))):
        svi = make(vae.model, vae.guide, Adam({"lr": LEARNING_RATE}), elbo)
        steps[f"{name} {kind}"] = lambda svi=svi: svi.step(batch)
    return Found(mean, variance, plan.base * plan.num_rows, soft), steps


def relative_bias(found: Found, reference: Found, draws: int) -> float:
    """The distance of two means over the length of the second, less what the draws' noise adds."""
    noise = float((found.variance + reference.variance).sum()) / draws
    length = float(reference.mean.square().sum() - reference.variance.sum() / draws)
    distance = float((found.mean - reference.mean).square().sum()) - noise
    return max(distance, 0.0) ** 0.5 / length**0.5


def main() -> None:
    """Print the table."""
    parser = timing_parser(__doc__.splitlines()[0], "a small VAE; no time is asserted")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--adapt", type=int, default=400)
    parser.add_argument("--backend", default="inductor")
    args = parsed(parser)
    args.sizes = LINEAR
    if args.smoke:
        args.sizes, args.backend, args.rounds, args.seconds = (784, 8), "replay", 1, 0.01
        args.draws, args.train, args.adapt = 40, 5, 5
    torch.manual_seed(0)
    images, source = vae_batch(10000, args.device)
    trained = checkpoint(args.sizes, images, args)
    found: dict[str, Found] = {}
    steps: dict[str, Step] = {}
    for name in tqdm(MAKE, desc="gradients", disable=args.smoke):
        found[name], made = look(name, trained, images, args)
        steps |= made
    with quiet_machine():
        times = measure(steps, args.rounds, args.seconds, args.device)
    print(f"{source}, batch {BATCH}, bits {args.sizes[-1]}; variance and time over {REFERENCE}'s")
    print("| estimator | bias | variance | runs | ms eager | ms compiled | variance x time |")
    print("|---|---|---|---|---|---|---|")
    reference = found[REFERENCE]
    for name, each in found.items():
        bias = "0"
        if name.startswith(BIASED):
            bias = f"{relative_bias(each, reference, args.draws):.2f}"
        variance = float(each.variance.sum() / reference.variance.sum())
        require(variance > 0, f"{name} has no variance")
        eager, fast = (statistics.median(times[f"{name} {kind}"]) for kind in ("eager", "compiled"))
        slower = statistics.median(ratios(times, f"{name} compiled", f"{REFERENCE} compiled"))
        runs = f"{each.rows}" + (f", {each.soft} of them relaxed" if each.soft else "")
        cells = [name, bias, f"{variance:.2g}", runs, f"{eager:.2f}", f"{fast:.2f}"]
        print("| " + " | ".join([*cells, f"{variance * slower:.2g}"]) + " |")


if __name__ == "__main__":
    main()
