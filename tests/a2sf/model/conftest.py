"""Fixtures for tests of models."""

import pytest

from a2sf.model import families


@pytest.fixture(params=families.SUPPORTED_ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)
