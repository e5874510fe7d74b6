"""Adds this engine to EleutherAI's lm-evaluation-harness as a model.

Owns the command `a2sf-lm-eval`. It registers the model `a2sf` and runs the harness's own command
line with unchanged arguments. The help shows this project's part first, then the harness's. Knows
nothing of how the model answers: `tuner.harness.model` does, and the harness imports it on demand.
"""

import sys
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from a2sf.errors import A2SFError
from a2sf.threads import wait_passively

MODEL_NAME = "a2sf"
"""The model's name for `--model`."""


def register() -> None:
    """Register the model with the harness in this process; a second call has no effect.

    Raises ModuleNotFoundError if the extra `eval` is not installed.
    """
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target="tuner.harness.model:HarnessModel")


def main() -> None:
    """Run the harness's command line; an error is one line on stderr and exit code 2."""
    wait_passively()
    try:
        from lm_eval.__main__ import cli_evaluate

        register()
        if asks_for_help(sys.argv[1:]):
            print(help_text(), flush=True)
    except ModuleNotFoundError as error:
        _fail(f"{error}; the harness is an extra: pip install 'a2sf-serve[eval]'")
    try:
        cli_evaluate()
    except A2SFError as error:
        _fail(str(error))


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the harness prints its general help, or the help of `run`."""
    if arguments[:1] in (["ls"], ["validate"]):
        return False
    return list(arguments) in ([], ["run"]) or not {"-h", "--help"}.isdisjoint(arguments)


def help_text() -> str:
    """Return the help that this command adds to the harness's: the model and its arguments."""
    from tuner.harness.arguments import Arguments

    lines = [
        "a2sf-lm-eval is lm-eval with one more model. For example:",
        "",
        f"  a2sf-lm-eval --model {MODEL_NAME} --tasks my_task --include_path my_tasks/ \\",
        "      --model_args pretrained=reference,policy=a2sf:.9:.5,ratio=0.2,prefill_chunk=1",
        "",
        f"--model_args of --model {MODEL_NAME}, as NAME=VALUE with commas between them:",
        "",
    ]
    for name, field in Arguments.model_fields.items():
        description = field.description or ""
        if field.is_required():
            description += " Required."
        elif field.default is not None:
            description += f" Default: {field.default}."
        indent = " " * 18
        lines.append(
            textwrap.fill(description, 88, initial_indent=f"  {name:<16}", subsequent_indent=indent)
        )
    return "\n".join([*lines, "", "The help of lm-eval follows.", ""])


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
