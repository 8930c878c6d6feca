"""What a differentiable crop costs: forward, and backward to the box.

28x28 pixels from images of 100x100, against torch's own way and kornia's. It measures as
``svi_step.py`` does, see ``README.md`` beside this file.

    python benchmarks/crop.py --rounds 21
    python benchmarks/crop.py --to-image         # the gradient to the images as well
    python benchmarks/crop.py --device cuda
"""

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch
from _arguments import parsed, timing_parser
from _timing import Step, Times, measure, quiet_machine, ratio_table, ratios, spread
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from pyro_nondiff.handlers import SpatialTransformer, _bilinear
from pyro_nondiff.ops import crop
from pyro_nondiff.ops._grid import box_grid

try:
    from kornia.geometry.transform import crop_and_resize
except ImportError:
    crop_and_resize = None

Crop = Callable[[Tensor, Tensor], Tensor]

IMAGE, SIZE = 100, 28
TORCH = "affine_grid + grid_sample"
KORNIA = "kornia crop_and_resize"
OURS = "SpatialTransformer()"
COMPOSED = "the same by composed operations"
KERNEL = "grid_sample alone, its grid given"
MATRICES = "two products with matrices of tents"


def by_torch(image: Tensor, box: Tensor) -> Tensor:
    """A map of each box, a grid of each map."""
    x0, y0, w, h = box.unbind(-1)
    zero = torch.zeros_like(w)
    rows = [torch.stack([w, zero, 2 * x0 + w - 1], -1), torch.stack([zero, h, 2 * y0 + h - 1], -1)]
    shape = [len(image), image.shape[1], SIZE, SIZE]
    grid = affine_grid(torch.stack(rows, -2), shape, align_corners=False)
    return grid_sample(image, grid, align_corners=False)


def by_kornia(image: Tensor, box: Tensor) -> Tensor:
    """Corners in pixels; here boxes end at the centres of pixels."""
    x0, y0, w, h = (box * (IMAGE - 1)).unbind(-1)
    corners = [(x0, y0), (x0 + w, y0), (x0 + w, y0 + h), (x0, y0 + h)]
    pixels = torch.stack([torch.stack(corner, -1) for corner in corners], -2)
    return crop_and_resize(image, pixels, (SIZE, SIZE), align_corners=True)


def by_matrices(image: Tensor, box: Tensor) -> Tensor:
    """The separable form: every pixel of a row or column is weighed."""
    grid = box_grid(box, (IMAGE, IMAGE), (SIZE, SIZE))
    pixels = torch.arange(IMAGE, device=image.device)
    across = (1 - (grid.x.mT - pixels).abs()).clamp(min=0)
    down = (1 - (grid.y - pixels).abs()).clamp(min=0)
    return down @ image @ across.mT


def composed(image: Tensor, box: Tensor) -> Tensor:
    """The way that small outputs take."""
    x, y = box_grid(box, (IMAGE, IMAGE), (SIZE, SIZE))
    return _bilinear._compose(image, x, y, border=False)


def under(handler: SpatialTransformer) -> Crop:
    """The op, under a handler."""

    def ours(image: Tensor, box: Tensor) -> Tensor:
        with handler:
            return crop("crop", image, box, (SIZE, SIZE))

    return ours


def crops() -> dict[str, Crop]:
    """The candidates that start from a box."""
    found = {TORCH: by_torch, OURS: under(SpatialTransformer()), COMPOSED: composed}
    found[MATRICES] = by_matrices
    for mode in ("multiscale", "gaussian"):
        found[f'SpatialTransformer("{mode}")'] = under(SpatialTransformer(mode))
    if crop_and_resize is not None:
        found[KORNIA] = by_kornia
    return found


def steps(args: argparse.Namespace) -> dict[str, Step]:
    """One forward and backward pass of each candidate."""
    image = torch.rand(args.batch, args.channels, IMAGE, IMAGE, device=args.device)
    place = [0.5 * torch.rand(args.batch, 2), 0.2 + 0.3 * torch.rand(args.batch, 2)]
    box = torch.cat(place, -1).to(args.device).requires_grad_()
    image.requires_grad_(args.to_image)
    upstream = torch.rand(args.batch, args.channels, SIZE, SIZE, device=args.device)
    wanted = [box, image] if args.to_image else [box]

    def step(candidate: Crop) -> Step:
        return lambda: torch.autograd.grad(candidate(image, box), wanted, upstream)

    found = {name: step(candidate) for name, candidate in crops().items()}
    x, y = (part.detach() for part in box_grid(box, (IMAGE, IMAGE), (SIZE, SIZE)))
    parts = [((2 * part + 1) / IMAGE - 1).expand(args.batch, 1, SIZE, SIZE) for part in (x, y)]
    grid = torch.stack(parts, -1).squeeze(1).requires_grad_()
    given = [grid, image] if args.to_image else [grid]
    found[KERNEL] = lambda: torch.autograd.grad(
        grid_sample(image, grid, align_corners=False), given, upstream
    )
    return found


def check(args: argparse.Namespace) -> None:
    """The bilinear candidates give the same crop, and the same gradients."""
    image = torch.rand(args.batch, args.channels, IMAGE, IMAGE, device=args.device)
    place = [0.5 * torch.rand(args.batch, 2), 0.2 + 0.3 * torch.rand(args.batch, 2)]
    box = torch.cat(place, -1).to(args.device).requires_grad_()
    image.requires_grad_()
    upstream = torch.rand(args.batch, args.channels, SIZE, SIZE, device=args.device)

    def found(candidate: Crop) -> list[Tensor]:
        value = candidate(image, box)
        return [value, *torch.autograd.grad(value, [box, image], upstream)]

    expected = found(by_torch)
    for name in (OURS, COMPOSED, MATRICES):  # kornia counts pixels in another way
        candidate = crops()[name]
        for a, b in zip(found(candidate), expected, strict=True):
            # float32 on 100 pixels: a position is rounded by 1e-5 of a pixel
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)


def targets(times: Times) -> Iterator[str]:
    """What was asked for, and what was found."""
    yield "| target | found | at most | met |"
    yield "|---|---|---|---|"
    for to, limit in ((TORCH, 0.5), (KORNIA, 0.35)):
        if to in times:
            found = ratios(times, OURS, to)
            met = "yes" if statistics.median(found) <= limit else "no"
            yield f"| {OURS} / {to} | {spread(found)} | {limit} | {met} |"


def main() -> None:
    """Measure, and print tables in Markdown."""
    parser = timing_parser("Time a differentiable crop.", "small, and check the results")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--to-image", action="store_true", help="with the gradient to the images")
    args = parsed(parser)
    torch.manual_seed(0)
    if args.smoke:
        args.rounds, args.seconds, args.batch = 1, 0.001, 2
        check(args)
    print(f"torch {torch.__version__}, {args.device}, one thread, batch {args.batch},")
    print(f"{args.rounds} rounds; median (least to greatest).\n")
    with quiet_machine():
        times = measure(steps(args), args.rounds, args.seconds, args.device)
    compared = [name for name in (TORCH, KORNIA) if name in times]
    print("\n".join(ratio_table(times, compared)))
    if not args.to_image:  # they are about the box
        print("\n## Targets\n")
        print("\n".join(targets(times)))


if __name__ == "__main__":
    main()
