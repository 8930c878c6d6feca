"""What every test stands on: the options, the seed, and a guard over global state.

Tests run in float64 on the CPU. ``--dtype`` and ``--device`` run the same tests elsewhere: they
set torch's defaults, so a test that names no device and no dtype follows them.
"""

import copy
import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyro
import pyro.settings
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch.distributions import Distribution
from torch.utils._pytree import tree_map

_DTYPE_BEFORE = pytest.StashKey[torch.dtype]()


class _TorchGenerator:
    """Torch's global generators as Hypothesis wants them: the same draws in every example."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return torch.get_rng_state(), on_gpu

    def setstate(self, state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
        torch.set_rng_state(state[0])
        if state[1]:
            torch.cuda.set_rng_state_all(state[1])


_TORCH_GENERATOR = pytest.StashKey[_TorchGenerator]()
hypothesis.settings.register_profile("derandomized", derandomize=True, deadline=None)
hypothesis.settings.load_profile("derandomized")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where and in which precision the tests run, and from which seeds."""
    group = parser.getgroup("pyro_nondiff")
    group.addoption("--device", default="cpu", help="device of the tests (default: cpu)")
    group.addoption(
        "--dtype",
        default="float64",
        choices=["float16", "bfloat16", "float32", "float64"],
        help="default dtype of the tests (default: float64)",
    )
    group.addoption(
        "--vary-seed", type=int, default=0, help="another number gives every test another seed"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Set torch's defaults before the test modules are imported: they may hold tensors."""
    # Hypothesis manages it as long as it lives: until the end of this run, which may be one
    # that a test has started inside another.
    config.stash[_TORCH_GENERATOR] = _TorchGenerator()
    hypothesis.register_random(config.stash[_TORCH_GENERATOR])
    config.stash[_DTYPE_BEFORE] = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, config.getoption("--dtype")))
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Put torch's defaults back."""
    del config.stash[_TORCH_GENERATOR]
    torch.set_default_dtype(config.stash[_DTYPE_BEFORE])
    if config.getoption("--device") != "cpu":
        torch.set_default_device(None)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of ``--device``, or the one that the test is parametrised with.

    ``@pytest.mark.parametrize("device", ["cpu", "meta"], indirect=True)`` runs a test on both.
    """
    return torch.device(getattr(request, "param", request.config.getoption("--device")))


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype of ``--dtype``, or the one that the test is parametrised with, by name."""
    name = getattr(request, "param", request.config.getoption("--dtype"))
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{name} is not a dtype")
    return dtype


@pytest.fixture
def meta() -> Callable[[Any], Any]:
    """A function that copies tensors, modules and containers of them to the meta device.

    A program run on the copies computes no numbers. It fails where it makes a tensor on the CPU
    and mixes it with them, and where it waits for a value (``.item()``, ``bool(tensor)``): the
    faults that otherwise show on a GPU only.
    """

    def to_meta(leaf: Any) -> Any:
        if isinstance(leaf, torch.nn.Module | torch.nn.Parameter):
            return copy.deepcopy(leaf).to("meta")
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().to("meta").requires_grad_(leaf.requires_grad)
        return leaf

    return lambda value: tree_map(to_meta, value)


@pytest.fixture
def compiler() -> None:
    """For a test that compiles C++. It is skipped where nothing can."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        pytest.skip("there is no C++ compiler here")


@pytest.fixture
def data_dir() -> Path:
    """The folder of the real data. The test is skipped where there is none."""
    folder = os.environ.get("PYRO_NONDIFF_DATA")
    if not folder:
        pytest.skip("the real data is not here: PYRO_NONDIFF_DATA is not set")
    return Path(folder)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of the test, from its name and ``--vary-seed``."""
    return zlib.crc32(f"{request.node.nodeid}{request.config.getoption('--vary-seed')}".encode())


@pytest.fixture
def param_store() -> Iterator[Any]:
    """Pyro's param store, for a test that may leave entries in it."""
    yield pyro.get_param_store()
    pyro.clear_param_store()


def _global_state() -> dict[str, Any]:
    """What a test must leave as it was: what it is called, and its value."""
    state = {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's function modes": torch._C._len_torch_function_stack(),
        "torch's grad mode": torch.is_grad_enabled(),
        "torch's seed (reseed inside torch.random.fork_rng)": torch.initial_seed(),
        "the validation default": Distribution._validate_args,
        "Pyro's handler stack": list(_PYRO_STACK),
        "Pyro's param store (use the fixture param_store)": sorted(pyro.get_param_store().keys()),
        "NumPy's global generator": zlib.crc32(np.random.get_state()[1].tobytes()),  # noqa: NPY002
        "Python's global generator": hash(random.getstate()),
    }
    if torch.cuda.is_initialized():
        state["torch's seed on the GPU"] = torch.cuda.initial_seed()
    return state | {f"Pyro's setting {key}": value for key, value in pyro.settings.get().items()}


def _restore(state: dict[str, Any]) -> None:
    """Put back what the next tests need. The generators are put back by the guard."""
    torch.set_grad_enabled(state["torch's grad mode"])
    torch.set_default_dtype(state["torch's default dtype"])
    device = state["torch's default device"]
    torch.set_default_device(None if device.type == "cpu" else device)
    while torch._C._len_torch_function_stack() > state["torch's function modes"]:
        torch.overrides._pop_mode()
    _PYRO_STACK[:] = state["Pyro's handler stack"]
    pyro.clear_param_store()
    prefix = "Pyro's setting "
    settings = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    pyro.settings.set(**settings)
    Distribution.set_default_validate_args(state["the validation default"])


@pytest.fixture(autouse=True)
def global_state_guard(request: pytest.FixtureRequest, seed: int) -> Iterator[None]:
    """Seed every generator, run the test, and fail it if it leaves global state changed.

    A test may draw from torch's generator, which is put back afterwards, but not reseed it. The
    generators of NumPy and Python are not to be touched: the library does not draw from them.
    """
    generators = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    request.node.add_report_section("setup", "seed", str(seed))
    before = _global_state()
    yield
    after = _global_state()
    torch.set_rng_state(generators[0])
    np.random.set_state(generators[1])  # noqa: NPY002
    random.setstate(generators[2])
    changed = [name for name in before if after[name] != before[name]]
    if changed:
        _restore(before)
        lines = [f"  {name}: {before[name]!r} before, {after[name]!r} after" for name in changed]
        pytest.fail("the test left global state changed:\n" + "\n".join(lines), pytrace=False)
