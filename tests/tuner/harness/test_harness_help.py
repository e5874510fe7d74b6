"""The help of `a2sf-lm-eval`: what is ours, then the harness's."""

import subprocess
import sys

import pytest

from tests.tuner.commands import ROOT
from tuner.harness.__main__ import asks_for_help
from tuner.harness.arguments import Arguments


@pytest.mark.parametrize(
    ("arguments", "asks"),
    [
        ("", True),
        ("--help", True),
        ("run", True),
        ("run -h", True),
        ("--model a2sf --help", True),
        ("ls --help", False),
        ("validate -h", False),
        ("ls", False),
        ("--model a2sf --tasks help", False),
    ],
)
def test_general_help_begins_with_the_arguments_of_the_model(arguments: str, asks: bool) -> None:
    assert asks_for_help(arguments.split()) == asks


@pytest.mark.timeout(200)
@pytest.mark.parametrize("arguments", [(), ("--help",), ("run", "--help")])
def test_the_harness_shows_the_arguments_of_our_model_before_its_own_help(
    arguments: tuple[str, ...],
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tuner.harness", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours, own, theirs = done.stdout.partition("The help of lm-eval follows.")
    assert own
    assert "usage: lm-eval" in theirs
    for name, field in Arguments.model_fields.items():
        assert f"\n  {name} " in ours
        assert field.description
        assert field.description.split()[0] in ours
