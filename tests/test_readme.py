"""What the README says is true: its example runs, and CI runs its commands."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.usefixtures("param_store")
def test_example_finds_the_exact_posterior(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 20
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    posterior = names["pyro"].param("logits").sigmoid()
    prior_logit = torch.tensor(0.3).logit()
    exact = (prior_logit + 2 * names["x"] - 2).sigmoid()
    torch.testing.assert_close(posterior, exact, atol=5e-3, rtol=0.0)
    said = [float(number) for number in re.findall(r"exact: (.*)", example)[0].split(",")]
    torch.testing.assert_close(torch.tensor(said), exact, atol=5e-4, rtol=0.0)
    assert capsys.readouterr().out.startswith("tensor(")


def test_ci_runs_the_command_of_the_readme() -> None:
    command = "python -m pip install tox && python -m tox run -e py"
    assert f"    {command}\n" in README
    assert command in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("environment", ["quickstart", "py"])
def test_commands_name_environments(environment: str) -> None:
    assert f"python -m pip install tox && python -m tox run -e {environment}\n" in README
    settings = (ROOT / "tox.ini").read_text()
    assert environment == "py" or f"[testenv:{environment}]" in settings
