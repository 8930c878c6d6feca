"""What hard attention saves at test time: one item is taken, against the soft sum of all.

It measures as ``svi_step.py`` does, see ``README.md`` beside this file.

    python benchmarks/selection.py --rounds 21
    python benchmarks/selection.py --device cuda
"""

import torch
from _arguments import parsed, timing_parser
from _timing import Step, measure, quiet_machine, ratio_table
from torch import Tensor, nn

from pyro_nondiff.handlers import soften
from pyro_nondiff.ops import select

BATCH, VECTORS, WIDTH, NETWORKS = 64, 196, 512, 10
SOFT_VECTORS, HARD_VECTORS = "soft sum of 196 vectors", "one of 196 vectors"
SOFT_NETWORKS, HARD_NETWORKS = "soft sum of 10 networks", "one of 10 networks"


def networks(device: str) -> list[nn.Module]:
    """Ten networks with a hidden layer of 1024 units."""
    made = (
        nn.Sequential(nn.Linear(WIDTH, 1024), nn.ReLU(), nn.Linear(1024, 10)) for _ in range(10)
    )
    return [net.to(device) for net in made]


def steps(device: str) -> dict[str, Step]:
    """A choice of each kind, without gradient."""
    scores = torch.randn(BATCH, VECTORS, device=device)
    vectors = torch.randn(BATCH, VECTORS, WIDTH, device=device)
    x = torch.randn(BATCH, WIDTH, device=device)
    items = [lambda net=net: net(x) for net in networks(device)]
    which = torch.randn(NETWORKS, device=device)

    def vector() -> Tensor:
        return select("vector", scores, vectors, event_dim=1)

    def network() -> Tensor:
        return select("network", which, items)

    return {
        HARD_VECTORS: vector,
        SOFT_VECTORS: soften()(vector),
        HARD_NETWORKS: network,
        SOFT_NETWORKS: soften()(network),
    }


def check(device: str) -> None:
    """A soft choice that is sharp is the hard one, in which one network alone runs."""
    calls: list[int] = []
    scores = torch.tensor([0.0, 2.0, 1.0], device=device)
    vectors = torch.randn(3, 4, device=device)

    def item(i: int) -> Tensor:
        calls.append(i)
        return vectors[i]

    hard = select("network", scores, [lambda i=i: item(i) for i in range(3)])
    if calls != [1]:
        raise RuntimeError(f"networks {calls} ran, and 1 was chosen")
    with soften(temperature=0.01):
        soft = select("vector", scores, vectors, event_dim=1)
    torch.testing.assert_close(soft, hard)


def main() -> None:
    """Measure, and print tables in Markdown."""
    parser = timing_parser(
        "Time hard selection against the soft sum.", "short, and check the results"
    )
    args = parsed(parser)
    torch.manual_seed(0)
    if args.smoke:
        args.rounds, args.seconds = 1, 0.001
        check(args.device)
    print(f"torch {torch.__version__}, {args.device}, one thread, batch {BATCH},")
    print(f"{args.rounds} rounds; median (least to greatest).\n")
    with quiet_machine(), torch.no_grad():
        times = measure(steps(args.device), args.rounds, args.seconds, args.device)
    print("\n".join(ratio_table(times, [SOFT_VECTORS, SOFT_NETWORKS])))


if __name__ == "__main__":
    main()
