"""Builds in a temporary folder; pyproject.toml has all settings.

setuptools builds in `build/` of the source tree and never removes a file there. A module that was
moved or deleted would stay in every later wheel that is built from this tree.
"""

import tempfile

from setuptools import setup
from setuptools.command.build import build


class BuildInTemporaryFolder(build):
    """The standard build, in a folder that is removed at the end of the process."""

    def initialize_options(self) -> None:
        """Choose the folder; an option --build-base still has priority."""
        super().initialize_options()
        self._folder = tempfile.TemporaryDirectory(prefix="a2sf-build-")
        self.build_base = self._folder.name


setup(cmdclass={"build": BuildInTemporaryFolder})
