"""The arguments that benchmarks share."""

import argparse

import torch


def parser(description: str, smoke: str = "check, and time nothing") -> argparse.ArgumentParser:
    """A parser that knows the device, and ``--smoke``.

    Arguments:
        description: Of the benchmark.
        smoke: What ``--smoke`` does.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", default="cpu", help="cpu, or cuda")
    made.add_argument("--smoke", action="store_true", help=smoke)
    return made


def timing_parser(
    description: str, smoke: str = "check, and time nothing", rounds: int = 11
) -> argparse.ArgumentParser:
    """A parser that knows as well how often and how long candidates are timed."""
    made = parser(description, smoke)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--seconds", type=float, default=0.1, help="of each timing")
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """What is asked for on the command line, if it can be done here."""
    args = made.parse_args()
    if vars(args).get("rounds", 1) < 1:
        made.error(f"--rounds must be at least 1, found {args.rounds}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        made.error("--device cuda: torch finds no GPU here")
    return args
