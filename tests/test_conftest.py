"""The fixtures themselves: each guard can fail, and what it guards is put back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyro
import pytest
import torch
from hypothesis import given

CONFTEST = (Path(__file__).parent / "conftest.py").read_text()

LEAKS = {
    "torch's default dtype": "torch.set_default_dtype(torch.float16)",
    "torch's default device": "torch.set_default_device('meta')",
    "torch's function modes": "torch.set_default_device('cpu')",
    "torch's grad mode": "torch.set_grad_enabled(False)",
    "torch's seed": "torch.manual_seed(3)",
    "the validation default": "torch.distributions.Distribution.set_default_validate_args(False)",
    "Pyro's handler stack": "pyro.poutine.trace().__enter__()",
    "Pyro's param store": "pyro.param('p', torch.zeros(()))",
    "NumPy's global generator": "numpy.random.rand(700)",
    "Python's global generator": "random.random()",
    "Pyro's setting validate_infer": "pyro.enable_validation(False)",
    "Pyro's setting module_local_params": "pyro.settings.set(module_local_params=True)",
}


@pytest.fixture
def inner(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """A function that runs the source of a test module under this project's ``conftest.py``."""

    def run(source: str, *options: str) -> pytest.RunResult:
        pytester.makeconftest(CONFTEST)
        header = "import numpy, random, os, pyro, pytest, torch\n"
        pytester.makepyfile(header + source)
        device = torch.get_default_device()
        torch.set_default_device(None)
        try:
            return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)
        finally:
            torch.set_default_device(None if device.type == "cpu" else device)

    return run


@pytest.mark.parametrize(("name", "statement"), LEAKS.items(), ids=LEAKS)
def test_leak_fails_the_test_and_is_put_back(
    inner: Callable[..., pytest.RunResult], name: str, statement: str
) -> None:
    result = inner(
        f"def test_leak():\n    {statement}\n"
        "def test_next():\n    assert torch.zeros(()).dtype is torch.float64\n"
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*the test left global state changed*", f"*{name}*before*after*"])


def test_clean_tests_pass(inner: Callable[..., pytest.RunResult]) -> None:
    inner(
        "def test_draws():\n    torch.rand(3)\n"
        "def test_forks():\n    with torch.random.fork_rng():\n        torch.manual_seed(0)\n"
        "def test_validates():\n    with pyro.validation_enabled(False):\n        pass\n"
        "def test_trains(param_store):\n    pyro.param('p', torch.zeros(()))\n"
        "def test_sees_none_of_it():\n    assert not len(pyro.get_param_store())\n"
    ).assert_outcomes(passed=5)


def test_seed_depends_on_the_test_alone(inner: Callable[..., pytest.RunResult]) -> None:
    source = (
        "draws = []\n"
        "@pytest.mark.parametrize('turn', [0, 1])\n"
        "def test_draw(turn):\n"
        "    draws.append(torch.rand(()).item())\n"
        "    with open('draws.txt', 'a') as file:\n        file.write(f'{draws[-1]!r}\\n')\n"
    )
    inner(source).assert_outcomes(passed=2)
    inner(source, "-k", "1").assert_outcomes(passed=1, deselected=1)
    inner(source, "-k", "1", "--vary-seed", "5").assert_outcomes(passed=1, deselected=1)
    first, second, alone, varied = Path("draws.txt").read_text().split()
    assert second == alone
    assert len({first, second, varied}) == 3


def test_options_set_device_and_dtype(inner: Callable[..., pytest.RunResult]) -> None:
    inner(
        "at_import = torch.zeros(())\n"
        "def test_defaults(device, dtype):\n"
        "    for tensor in (at_import, torch.zeros(())):\n"
        "        assert tensor.device == device == torch.device('meta')\n"
        "        assert tensor.dtype is dtype is torch.float32\n",
        "--device=meta",
        "--dtype=float32",
    ).assert_outcomes(passed=1)
    assert torch.zeros(()).device.type != "meta"


def test_data_dir_skips_where_there_is_no_data(
    inner: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def test_data(data_dir):\n    assert data_dir.is_dir()\n"
    monkeypatch.delenv("PYRO_NONDIFF_DATA", raising=False)
    inner(source).assert_outcomes(skipped=1)
    monkeypatch.setenv("PYRO_NONDIFF_DATA", ".")
    inner(source).assert_outcomes(passed=1)


@pytest.mark.parametrize("device", ["cpu", "meta"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_device_and_dtype_can_be_parameters(device: torch.device, dtype: torch.dtype) -> None:
    tensor = torch.zeros((), device=device, dtype=dtype)
    assert tensor.device == device
    assert tensor.dtype is torch.float32


def test_meta_copies_what_holds_tensors(meta: Callable[[Any], Any]) -> None:
    module, weight = torch.nn.Linear(2, 3), torch.zeros(2, requires_grad=True)
    on_meta = meta({"module": module, "tensors": (weight, torch.zeros(1)), "number": 3})
    assert {p.device.type for p in on_meta["module"].parameters()} == {"meta"}
    assert on_meta["module"].weight.requires_grad
    assert [t.requires_grad for t in on_meta["tensors"]] == [True, False]
    assert on_meta["tensors"][0].is_leaf
    assert on_meta["number"] == 3
    assert module.weight.device.type != "meta"


@pytest.mark.parametrize(
    "fault",
    [lambda x: x + torch.zeros(2, device="cpu"), lambda x: x.sum().item(), lambda x: bool(x[0])],
)
def test_meta_finds_faults(meta: Callable[[Any], Any], fault: Callable[[Any], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        fault(meta(torch.ones(2)))


def test_hypothesis_is_derandomised() -> None:
    draws: list[tuple[int, float]] = []

    @given(st.integers())
    def examples(number: int) -> None:
        draws.append((number, torch.rand(()).item()))

    examples()
    count = len(draws)
    examples()
    assert draws[count:] == draws[:count]
    assert len({draw for _, draw in draws}) == 1


def test_param_store_is_empty_at_the_start(param_store: Any) -> None:
    assert len(param_store) == 0
    pyro.param("p", torch.zeros(()))
