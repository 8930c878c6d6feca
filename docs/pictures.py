"""Draws the pictures of the site, and computes its table of biases, while Sphinx builds it.

Each picture is drawn twice, for a light and for a dark page. ``.. picture:: name`` shows it; the
text under the directive is its caption. What is written goes to ``_build``, which git ignores.
"""

import csv
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from docutils import nodes
from docutils.parsers.rst import directives
from matplotlib.figure import Figure
from sphinx.util.docutils import SphinxDirective
from torch import Tensor

import pyro_nondiff.distributions as laws
from pyro_nondiff import handlers, noise
from pyro_nondiff.estimators import REINFORCE, MovingAverage
from pyro_nondiff.infer import ExpectedCost
from tests.distributions.biases import CASES, bias_table
from tests.handlers.crop_program import bright_patch, search

FOLDER = Path(__file__).parent / "_build" / "pictures"

ACCENTS = {
    "light": ("#b5441c", "#1f6f8b", "#6a7d1e", "#7a4f9a"),
    "dark": ("#f29066", "#6cc0dc", "#b9cf62", "#c3a0e0"),
}
INK = {"light": "#30302e", "dark": "#dcdcd8"}
DASHES = ("-", "--", "-.", ":")
GRADIENTS = ("identity", "selected", "softmax", "gumbel", "gumbel_rao", "reinmax")
ROUNDING = 1e-9


def style(theme: str) -> dict[str, Any]:
    """Settings of matplotlib for a light or a dark page; its background shows through."""
    ink = INK[theme]
    return {
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "axes.prop_cycle": matplotlib.cycler(color=ACCENTS[theme], linestyle=DASHES),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 11,
        "font.size": 11,
        "legend.frameon": False,
        "legend.labelcolor": ink,
        "lines.linewidth": 2,
        "savefig.transparent": True,
        "svg.hashsalt": "pyro_nondiff",
        "text.color": ink,
        "xtick.color": ink,
        "ytick.color": ink,
    }


def canvas(height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure as narrow as a telephone can show, and its axes."""
    figure = Figure(figsize=(5.2, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def colours() -> list[str]:
    """The accents of the page that is drawn for."""
    return list(matplotlib.rcParams["axes.prop_cycle"].by_key()["color"])


def curve(axes: Any, x: Tensor, y: Tensor, label: str) -> None:
    """A line through tensors."""
    axes.plot(x.numpy(), y.detach().numpy(), label=label)


def histogram(axes: Any, draws: Tensor, edges: Tensor, **kwargs: Any) -> None:
    """The density of draws, as steps; those beyond the edges count too."""
    counts, _ = np.histogram(draws.numpy(), edges.numpy())
    density = counts / draws.numel() / edges.diff().numpy()
    axes.stairs(density, edges.numpy(), fill=True, alpha=0.3, **kwargs)


def straight_through() -> Figure:
    """The gradient of a value at each noise that makes it."""
    figure, axes = canvas(4.6, 3, 2, sharex=True, sharey=True)
    x = torch.linspace(-5, 5, 401)
    for panel, gradient in zip(axes.flat, GRADIENTS, strict=True):
        logits = torch.full_like(x, -0.4).requires_grad_()
        law = laws.StraightThroughBernoulli(
            logits=logits,
            gradient=gradient,
            temperature=0.5 if gradient in ("softmax", "gumbel", "gumbel_rao") else 1.0,
            num_conditional=1000,
        )
        fresh = torch.linspace(0, 1, 1002)[1:-1].logit().unsqueeze(-1)
        with noise.source(lambda r, fresh=fresh: x if r.role == "u" else fresh.expand(r.shape)):
            value = law.rsample()
        (slope,) = torch.autograd.grad(value.sum(), logits)
        slope[value.detach().diff(prepend=value[:1].detach()) != 0] = torch.nan
        panel.plot(x.numpy(), slope.numpy())
        panel.axvline(0.4, color=matplotlib.rcParams["text.color"], linewidth=0.8, linestyle=":")
        panel.set_title(gradient)
        panel.set_ylim(0, 0.56)
    figure.supxlabel("noise: the value is 0 left of the dots, 1 right of them", fontsize=11)
    figure.supylabel("gradient of the value", fontsize=11)
    return figure


def straight_through_bias() -> Figure:
    """The bias of each gradient for one Bernoulli."""
    figure, axes = canvas(4.4)
    for shift, degree in enumerate(("linear", "quadratic", "cubic")):
        sizes = [
            100 * row.relative
            for gradient in GRADIENTS
            for row in bias_table()
            if (row.factors, row.cost) == ("one Bernoulli", degree)
            and (row.gradient, row.temperature) == (gradient, 1.0)
        ]
        places = np.arange(len(GRADIENTS)) + 0.27 * (shift - 1)
        bars = axes.barh(places, sizes, 0.24, color=colours()[shift], label=f"{degree} cost")
        numbers = ["0" if size < 100 * ROUNDING else f"{size:.0f} %" for size in sizes]
        axes.bar_label(bars, numbers, padding=3, fontsize=9)
    axes.set_yticks(range(len(GRADIENTS)), GRADIENTS)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xlabel("bias, in percent of the exact gradient")
    figure.legend(loc="outside upper center", ncols=3, columnspacing=1, handlelength=1)
    return figure


def relaxed_bernoulli() -> Figure:
    """Densities at several temperatures."""
    figure, axes = canvas(3.2)
    x = torch.linspace(0.002, 0.998, 800)
    for temperature in (0.2, 0.5, 1.0, 2.0):
        law = laws.RelaxedBernoulli(temperature, logits=torch.tensor(0.5))
        curve(axes, x, law.log_prob(x).exp(), f"T = {temperature:g}")
    axes.set(xlim=(0, 1), ylim=(0, 3), xlabel="value", ylabel="density")
    axes.legend(loc="upper center", ncols=2)
    return figure


def relaxed_one_hot() -> Figure:
    """Draws on the simplex of three categories."""
    figure, axes = canvas(2.1, 1, 3)
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.866]])
    for panel, temperature in zip(axes, (2.0, 0.7, 0.2), strict=True):
        law = laws.RelaxedOneHotCategorical(temperature, probs=torch.tensor([0.5, 0.3, 0.2]))
        x, y = (law.sample((600,)) @ corners).T.numpy()
        edge = torch.cat([corners, corners[:1]]).T.numpy()
        panel.plot(*edge, color=matplotlib.rcParams["text.color"], linewidth=0.8, linestyle="-")
        panel.scatter(x, y, s=5, color=colours()[0], alpha=0.5, linewidths=0, clip_on=False)
        panel.set_title(f"T = {temperature:g}")
        panel.set_aspect("equal")
        panel.axis("off")
    return figure


def temperature() -> Figure:
    """Both schedules, from 1 to 0.1."""
    figure, axes = canvas(2.8)
    for schedule in (laws.ExponentialAnnealing, laws.LinearAnnealing):
        annealed = schedule(1.0, 0.1, num_steps=100)
        values = []
        for _ in range(131):
            values.append(float(annealed.value))
            annealed.step()
        axes.plot(values, label=schedule.__name__)
    axes.set(xlabel="calls of step()", ylabel="temperature", ylim=(0, 1.05))
    axes.legend()
    return figure


def hard_concrete() -> Figure:
    """The density between 0 and 1, and the probabilities of the two."""
    figure, (top, bottom) = canvas(4.6, 2, 1, height_ratios=(3, 2))
    x = torch.linspace(0.001, 0.999, 800)
    places = (-2.0, 0.0, 2.0)
    for logit in places:
        law = laws.HardConcrete(torch.tensor(logit))
        curve(top, x, law.log_prob(x).exp(), f"logit {logit:g}")
    top.set(xlim=(0, 1), ylim=(0, 1.4), xlabel="value", ylabel="density between")
    top.legend(loc="upper center", ncols=3, columnspacing=1)
    gate = laws.HardConcrete(torch.tensor(places))
    between = 1 - gate.prob_zero - gate.prob_one
    start, (accent, other, *_) = torch.zeros(3), colours()
    for part, size, colour, alpha in (
        ("exactly 0", gate.prob_zero, other, 0.9),
        ("between", between, other, 0.3),
        ("exactly 1", gate.prob_one, accent, 0.9),
    ):
        options = {"left": start, "color": colour, "alpha": alpha, "label": part}
        bottom.barh([f"{logit:g}" for logit in places], size, 0.6, **options)
        for row, (left, width) in enumerate(zip(start.tolist(), size.tolist(), strict=True)):
            if width > 0.08:
                ink = matplotlib.rcParams["text.color"] if alpha < 0.5 else "white"
                ink = "black" if ink == "white" and "f" in accent[:2] else ink
                centre = left + width / 2
                bottom.text(centre, row, f"{width:.2f}", ha="center", va="center", color=ink)
        start = start + size
    bottom.set(xlim=(0, 1), xlabel="probability", ylabel="logit")
    bottom.invert_yaxis()
    bottom.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1)
    return figure


def scale_gamma() -> Figure:
    """Draws and densities of two scales of one concentration."""
    figure, axes = canvas(3.2)
    x = torch.linspace(0.001, 14, 500)
    for number, scale in enumerate((1.0, 2.0)):
        law = laws.ScaleGamma(3.0, torch.tensor(scale))
        histogram(axes, law.sample((20_000,)), torch.linspace(0, 14, 57), color=colours()[number])
        curve(axes, x, law.log_prob(x).exp(), f"scale {scale:g}")
    axes.set(xlim=(0, 14), ylim=(0, None), xlabel="value", ylabel="density, k = 3")
    axes.legend()
    return figure


def exponential() -> Figure:
    """The map of a uniform number, and what comes out."""
    figure, (top, bottom) = canvas(4.8, 2, 1)
    u = torch.linspace(0.002, 1, 500)
    x = torch.linspace(0, 5, 300)
    for number, rate in enumerate((0.7, 1.0, 2.0)):
        law = laws.InverseCDFExponential(torch.tensor(rate))
        curve(top, u, law.from_noise(-u.log()), f"rate {rate:g}")
        curve(bottom, x, law.log_prob(x).exp(), f"rate {rate:g}")
        draws = law.sample((20_000,))
        histogram(bottom, draws, torch.linspace(0, 5, 51), color=colours()[number])
    top.set(xlim=(0, 1), ylim=(0, 5), xlabel="uniform number", ylabel="value")
    bottom.set(xlim=(0, 5), ylim=(0, 2), xlabel="value", ylabel="density")
    top.legend()
    return figure


def gamma() -> Figure:
    """Draws by rejection, and the gradient of each draw."""
    figure, (top, bottom) = canvas(5.2, 2, 1)
    x = torch.linspace(0.001, 6, 500)
    alpha = torch.full((20_000,), 1.5, requires_grad=True)
    law = laws.Gamma(alpha, 1.0, gradient="rejection", boost=1)
    z = law.rsample()
    histogram(top, z.detach(), torch.linspace(0, 6, 61), color=colours()[0], label="draws")
    curve(top, x, laws.Gamma(1.5, 1.0).log_prob(x).exp(), "density")
    top.set(xlim=(0, 6), ylim=(0, None), xlabel="value", ylabel="density, concentration 1.5")
    top.legend()
    whole = z + z.detach() * law.score_parts(z).score_function
    by_rejection = torch.autograd.grad(whole.sum(), alpha)[0]
    implicit = laws.Gamma(alpha, 1.0).rsample()
    slope = torch.autograd.grad(implicit.sum(), alpha)[0]
    shown = slice(0, 1500)
    for value, gradient, label, colour in (
        (z, by_rejection, '"rejection", boost 1', colours()[0]),
        (implicit, slope, '"implicit"', colours()[1]),
    ):
        options = {"s": 6, "linewidths": 0, "alpha": 0.6, "color": colour, "label": label}
        bottom.scatter(value.detach()[shown].numpy(), gradient[shown].numpy(), **options)
    bottom.axhline(1, color=matplotlib.rcParams["text.color"], linewidth=0.8, linestyle=":")
    bottom.set(xlim=(0, 6), ylim=(-1, 4), xlabel="value", ylabel="gradient of the mean")
    bottom.legend(markerscale=3, loc="upper left")
    return figure


def log_gamma() -> Figure:
    """The logarithms of Pyro's Gamma numbers at a small concentration, and those of LogGamma."""
    figure, (top, bottom) = canvas(5.0, 2, 1)
    edges = torch.linspace(-400, 10, 83)
    small = torch.tensor(0.01)
    plain = laws.Gamma(small, 1.0)
    histogram(top, plain.sample((50_000,)).log(), edges, color=colours()[1], label="log of a Gamma")
    x = torch.linspace(-400, 10, 800)
    law = laws.LogGamma(small, 1.0)
    draws = law.sample((50_000,))
    histogram(top, draws, edges, color=colours()[0], label="LogGamma")
    top.plot(x.numpy(), law.log_prob(x).exp().numpy(), color=colours()[0], linestyle="-")
    top.set(xlim=(-400, 10), ylim=(0, 0.02), xlabel="value", ylabel="density, conc. 0.01")
    top.legend(loc="upper left")
    concentration = torch.logspace(-4, 0, 60, dtype=torch.float64)
    tiny = torch.tensor(torch.finfo(torch.float32).tiny, dtype=torch.float64)
    below = torch.special.gammainc(concentration, tiny)
    curve(bottom, concentration, below, "below the smallest float32")
    bottom.set(xscale="log", ylim=(0, 1), xlabel="concentration", ylabel="probability")
    bottom.set_title("a Gamma number below the smallest of float32")
    return figure


@cache
def searches() -> dict[str, list[list[float]]]:
    """Learning curves of the program that looks for a bright patch, some for each handler."""
    ours = {
        "SpatialTransformer": (handlers.SpatialTransformer(), lambda: None, 1),
        "randomize, REINFORCE": (
            handlers.randomize(scale=0.08),
            lambda: REINFORCE(MovingAverage()),
            5,
        ),
        "ignore": (handlers.ignore(), lambda: None, 1),
    }
    return {
        name: [search(handler, ExpectedCost(estimator()), bright_patch(), 200) for _ in range(runs)]
        for name, (handler, estimator, runs) in ours.items()
    }


def crop_curves() -> Figure:
    """How a place is learnt under three handlers."""
    figure, axes = canvas(2.9)
    for name, runs in searches().items():
        curves = torch.tensor(runs)
        steps = 1 + torch.arange(curves.shape[1])
        (line,) = axes.plot(steps, curves.median(0).values, label=name)
        low, high = curves.min(0).values, curves.max(0).values
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.25, linewidth=0)
    axes.set(xlabel="step", ylabel="brightness found", ylim=(0, 1.05), xlim=(0, 200))
    axes.legend(loc="center right")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    drawn.__name__: drawn
    for drawn in (
        straight_through,
        straight_through_bias,
        relaxed_bernoulli,
        relaxed_one_hot,
        temperature,
        hard_concrete,
        scale_gamma,
        exponential,
        gamma,
        log_gamma,
        crop_curves,
    )
}


def bias_rows(factors: str) -> list[list[str]]:
    """The table of biases of one case: a row for each gradient, temperature and parameter."""
    rows: dict[tuple[str, ...], list[str]] = {}
    several = next(len(case.parameters) > 1 for case in CASES if case.name == factors)
    for row in bias_table():
        if row.factors == factors:
            heat = f"{row.temperature:g}" if row.gradient not in ("identity", "selected") else ""
            key = (row.gradient, heat, row.parameter) if several else (row.gradient, heat)
            bias = "**0**" if row.relative < ROUNDING else f"{100 * row.relative:.1f} %"
            rows.setdefault(key, []).append(bias)
    head = ["gradient", "T", *(["factor"] if several else []), "linear", "quadratic", "cubic"]
    return [head, *([*key, *cells] for key, cells in rows.items())]


def write_all(app: Any) -> None:
    """Writes pictures and tables. The random numbers of Sphinx's process are not touched."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for theme in ACCENTS:
        with matplotlib.rc_context(style(theme)):
            for name, drawn in PICTURES.items():
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    drawn().savefig(FOLDER / f"{name}_{theme}.svg", metadata={"Date": None})
    for case in CASES:
        path = FOLDER / f"{case.name.replace(' ', '_')}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(bias_rows(case.name))


class Picture(SphinxDirective):
    """A drawn picture by name, in its light and dark version, with a caption."""

    required_arguments = 1
    has_content = True
    option_spec = {"alt": directives.unchanged_required}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """A figure of two images, of which the page's theme shows one."""
        figure = nodes.figure(align="center")
        for theme in ACCENTS:
            uri = f"/_build/pictures/{self.arguments[0]}_{theme}.svg"
            options = {"alt": self.options["alt"], "classes": [f"only-{theme}"]}
            figure += nodes.image("", uri=uri, align="center", **options)
        caption, messages = self.state.inline_text(" ".join(self.content), self.lineno)
        figure += nodes.caption("", "", *caption)
        self.set_source_info(figure)
        return [figure, *messages]


def setup(app: Any) -> dict[str, bool]:
    """Connects the hook and the directive."""
    app.connect("builder-inited", write_all)
    app.add_directive("picture", Picture)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
