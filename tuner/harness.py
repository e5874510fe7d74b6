"""EleutherAI's lm-evaluation-harness with this engine as one of its models.

Owns the command `a2sf-lm-eval`: it registers the model `a2sf` and hands over to the harness's own
command line, arguments untouched. Knows nothing of how the model answers; that is
`tuner.harness_model`, which is loaded when the harness asks for it.
"""

import sys
from typing import NoReturn

from a2sf.errors import A2SFError
from a2sf.threads import wait_passively

MODEL_NAME = "a2sf"
"""What `--model` says."""


def register() -> None:
    """Make the model known to the harness in this process; once more does no harm.

    Raises ModuleNotFoundError where the extra `eval` is not installed.
    """
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target="tuner.harness_model:HarnessModel")


def main() -> None:
    """Run the harness's command line; what is refused is one line and exit code 2."""
    wait_passively()
    try:
        from lm_eval.__main__ import cli_evaluate

        register()
    except ModuleNotFoundError as error:
        _fail(f"{error}; the harness is an extra: pip install 'a2sf-serve[eval]'")
    try:
        cli_evaluate()
    except A2SFError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
