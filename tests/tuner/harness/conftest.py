"""The packaged model as transformers runs it."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from a2sf import reference


@pytest.fixture(scope="module")
def plain() -> Any:
    """The packaged model as transformers alone runs it."""
    model = AutoModelForCausalLM.from_pretrained(reference.path(), dtype=torch.float32)
    return model.eval()
