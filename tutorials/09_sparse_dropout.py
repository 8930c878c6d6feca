# %% [markdown]
# # Sparse dropout: a network that prunes itself
#
# Each weight of a network has noise of its own, and learns how much of it. On MNIST all but one in
# eighty drown in theirs and are thrown away, and the network that is left doubts what it has never
# seen.
#
# The lecture keeps dropout for two reasons: it prunes a network, and it tells how sure one is. For
# both, the *rate* of the noise should be learnt, weight by weight, and a rate has a gradient only
# if the noise is reparameterised. In sparse variational dropout a weight is normal, with mean
# $\mu$ and variance $\sigma^2$. The program pays for its errors, and for what it costs to know the
# weights: their KL divergence from a prior that prefers no scale. What is not worth that ends up
# with $\alpha = \sigma^2 / \mu^2 \to \infty$.
#
# A network of 784-300-100-10 units is trained with such weights, and with plain ones. A table says
# what they get wrong and how many weights are left; a picture shows which ones, and what the
# networks say to a digit that is turned until it is none.
#
#     python tutorials/09_sparse_dropout.py                    # 50 epochs, three seeds
#     python tutorials/09_sparse_dropout.py --steps 200        # as in the paper
#     python tutorials/09_sparse_dropout.py --device cuda

# %%
import statistics
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from _digits import mnist
from _pictures import tidy
from _tutorial import Tutorial, smoke_test
from matplotlib.figure import Figure
from pyro.infer import SVI
from torch import Tensor, nn
from tqdm import trange

from pyro_nondiff.distributions import LinearAnnealing
from pyro_nondiff.handlers import SpatialTransformer
from pyro_nondiff.infer import CompiledSVI, ExpectedCost, no_guide
from pyro_nondiff.nn import SparseLinear, compression, prune, weight_kl
from pyro_nondiff.ops import cost, warp

tutorial = Tutorial(
    __file__, "Prune a network by learning its noise.", steps=50, smoke=2, unit="epochs"
)
device = tutorial.device
digits, test = (split.to(device) for split in mnist(tutorial.args.data))
if smoke_test:
    digits, test = digits.at(slice(0, 1000)), test.at(slice(0, 200))

# %% [markdown]
# ## The network
#
# A `SparseLinear` has a variance for each weight. A program could draw the weights, but one draw
# would serve a whole batch, and make a noisy gradient. What random weights do to an input is all
# that matters, and it is a sum of normal numbers. So the layer's *activation* is the sample site,
# drawn for each digit apart:
#
# $$ a \sim \mathcal{N}(x \mu + b, \; x^2 \sigma^2) $$
#
# This is the local reparameterisation. The site's name is the layer's first argument. A weight
# whose noise has become 4.5 times its mean ($\log \alpha = 3$) is pruned: it is 0 from then on. In
# `net.eval()` there is no site, and the other weights are their means.

# %%
Layer = Callable[[str, int, int], nn.Module]


def lenet(layer: Layer) -> nn.Module:
    first, second, third = layer("1", 784, 300), layer("2", 300, 100), layer("3", 100, 10)
    net = nn.Sequential(nn.Flatten(-2), first, nn.ReLU(), second, nn.ReLU(), third)
    return net.to(device)


def plain(name: str, inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs)


# %% [markdown]
# ## The program
#
# The KL of the weights is a cost, stated once, outside of the plate. The plate says that a batch
# stands for all digits, so what a batch says is scaled by 600. There is no guide: activations are
# drawn from their own law, and `ExpectedCost` is the negative ELBO of the weights. A normal law is
# pathwise by default; another estimator could be chosen from outside.


# %%
def program(net: nn.Module, kl_weight: Tensor, sparse: bool) -> Callable[[Tensor], None]:
    def model(rows: Tensor) -> None:
        pyro.module("net", net)
        if sparse:
            cost("KL", kl_weight * weight_kl(net))
        with pyro.plate("data", len(digits), subsample=rows):
            law = dist.Categorical(logits=net(digits.images[rows]))
            pyro.sample("label", law, obs=digits.labels[rows])

    return model


# %% [markdown]
# ## Training
#
# At full weight the KL would prune the network before it has learnt anything, so its weight grows
# from 0 to 1 in the first half of the training. Settings were chosen on the last 10,000 of the
# digits to learn from. The test set is read once, after the last epoch.


# %%
def train(layer: Layer, seed: int) -> dict[str, Any]:
    net, sparse, epochs = lenet(layer), layer is SparseLinear, tutorial.steps
    half = len(digits) // 100 * epochs // 2
    kl_weight = LinearAnnealing(1e-3, 1.0, num_steps=half).to(device)
    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 3e-3}}
    optim = pyro.optim.LambdaLR({**adam, "lr_lambda": lambda epoch: min(1, 2 - 2 * epoch / epochs)})
    model, kind = program(net, kl_weight.value, sparse), SVI if smoke_test else CompiledSVI
    svi = kind(model, no_guide, optim, ExpectedCost())
    compressions = []
    for _ in trange(epochs, disable=smoke_test, unit="epoch"):
        for rows in torch.randperm(len(digits), device=device).split(100):
            svi.step(rows)
            kl_weight.step()
        optim.step()
        compressions.append(compression(net) if sparse else 1.0)
    return {**measure(net, sparse), "compressions": compressions}


# %% [markdown]
# ## What is left, and how sure it is
#
# `prune` makes a network of torch's own layers, with zeros for what is pruned, and its error is the
# one that counts. How sure it is must be asked of the network with noise: a prediction is the mean
# over draws, and its entropy says how far they agree. A digit that is turned becomes something that
# the network has never seen, until half a turn has made a 9 of a 6.

# %%
ANGLES = torch.arange(0, 181, 15, device=device)
some = test.at(slice(0, 1000))
six = int((some.labels == 6).nonzero()[0])


def turned(images: Tensor, degrees: Tensor) -> Tensor:
    """Images turned to the left."""
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    theta = torch.stack([cos, -sin, 0 * cos, sin, cos, 0 * cos]).reshape(2, 3)
    with SpatialTransformer():
        return warp("turned", images[:, None], theta, (28, 28))[:, 0]


def predict(net: nn.Module, images: Tensor, draws: int = 50) -> Tensor:
    """The classes' probabilities: means over draws of the noise."""
    return torch.stack([net(images).softmax(-1) for _ in range(draws)]).mean(0)


@torch.no_grad()
def measure(net: nn.Module, sparse: bool) -> dict[str, Any]:
    pruned = prune(net) if sparse else net
    kept = [layer.weight != 0 for layer in pruned.modules() if isinstance(layer, nn.Linear)]
    wrong = pruned.eval()(test.images).argmax(-1) != test.labels
    views = torch.stack([predict(net.train(), turned(some.images, angle)) for angle in ANGLES])
    return {
        "error": 100 * wrong.float().mean().item(),
        "compression": compression(net) if sparse else 1.0,
        "kept": [each.cpu() for each in kept],
        "entropy": dist.Categorical(views).entropy().mean(-1).cpu(),
        "turned error": 100 * (views.argmax(-1) != some.labels).float().mean(-1).cpu(),
        "six": views[:, six].cpu(),
    }


# %% [markdown]
# ## The result

# %%
sparse_runs = tutorial.run("sparse", train, SparseLinear)
plain_runs = tutorial.run("plain", train, plain)


def row(name: str) -> list[str]:
    runs = tutorial.results[name]
    zeros = [
        100 - 100 * statistics.median(run["kept"][n].float().mean().item() for run in runs)
        for n in range(3)
    ]
    entropy = [statistics.median(run["entropy"][n].item() for run in runs) for n in (0, 6)]
    return [
        name,
        tutorial.spread(name, "error"),
        tutorial.spread(name, "compression", 1),
        " / ".join(f"{layer:.1f}" for layer in zeros),
        " / ".join(f"{each:.2f}" for each in entropy),
    ]


head = ["weights", "test error, %", "compression", "zeros in each layer, %"]
tutorial.table([*head, "entropy upright / on the side, nats"], [row("sparse"), row("plain")])
tutorial.claim("compression", tutorial.median("sparse", "compression"), ">=", 80)
tutorial.claim("test error when pruned, %", tutorial.median("sparse", "error"), "<=", 2.1)


# %%
def figure() -> Figure:
    """What is kept above; below it a six that is turned, and all digits."""
    runs = {"sparse": sparse_runs[0], "plain": plain_runs[0]}
    kept, angles = runs["sparse"]["kept"], ANGLES.cpu()
    fig = plt.figure(figsize=(9.5, 7.6), layout="constrained")
    above, below = fig.add_gridspec(2, 1, height_ratios=[1, 1.25])

    pixels, second, curve = above.subgridspec(1, 3, width_ratios=[1, 1.3, 1]).subplots()
    fig.colorbar(pixels.imshow(kept[0].sum(0).reshape(28, 28), cmap="magma"), shrink=0.7)
    pixels.set(title="Weights kept of each pixel", xticks=[], yticks=[])
    rows, columns = (kept[1].sum(dim).argsort(descending=True) for dim in (1, 0))
    second.imshow(kept[1][rows][:, columns], cmap="gray_r", aspect="auto", interpolation="none")
    second.set(title="Second layer, sorted", xlabel="300 inputs", ylabel="100 outputs")
    curve.semilogy(range(1, tutorial.steps + 1), runs["sparse"]["compressions"], color="C3")
    curve.set(title="Weights to one that is kept", xlabel="epoch")
    curve.set_yticks([1, 3, 10, 30, 100], labels=[1, 3, 10, 30, 100])
    curve.minorticks_off()

    left, right = below.subgridspec(1, 2, width_ratios=[1.5, 1])
    strip, *bars = left.subgridspec(3, 1, height_ratios=[0.35, 1, 1]).subplots()
    views = [turned(test.images[six : six + 1], angle)[0].cpu() for angle in ANGLES]
    strip.imshow(torch.cat(views, -1), cmap="gray_r", aspect="auto")
    strip.set(title="One digit, turned: what it is said to be", xticks=[], yticks=[])
    for axes, (name, run) in zip(bars, runs.items(), strict=True):
        shares = run["six"].T
        axes.stackplot(angles, shares, labels=range(10), colors=plt.get_cmap("tab10").colors)
        axes.set(
            ylabel=name, yticks=[0, 1], ylim=(0, 1), xlim=(-7.5, 187.5), xticks=range(0, 181, 30)
        )
    bars[1].set(xlabel="degrees")
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "frameon": False}
    bars[0].legend(ncol=10, fontsize=8, handlelength=0.8, columnspacing=1, **place)

    entropy, wrong = right.subgridspec(2, 1).subplots(sharex=True)
    for colour, (name, run) in zip(("C3", "C0"), runs.items(), strict=True):
        entropy.plot(angles, run["entropy"], color=colour, label=name)
        wrong.plot(angles, run["turned error"], color=colour)
    entropy.set(title="1,000 digits, turned", ylabel="entropy, nats")
    entropy.legend(frameon=False)
    wrong.set(ylabel="error, %", xlabel="degrees", xticks=range(0, 181, 30))
    for axes in (curve, entropy, wrong):
        tidy(axes)
    return fig


tutorial.picture(figure())
tutorial.finish()
