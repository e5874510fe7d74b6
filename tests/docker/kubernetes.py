"""An overlay as a cluster is given it, for the tests of the manifests.

Owns finding the parts of what is rendered. Knows nothing of what they should be.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.validate_manifests import MANIFESTS, render
from service.config.options import ServerOptions
from service.config.settings import ENV_PREFIX, load
from tests.docker.test_docker import inherited, last

Resource = dict[str, Any]


def overlay_of(name: str) -> "Rendered":
    """The overlay of this name."""
    return Rendered(MANIFESTS / "overlays" / name)


class Rendered:
    """An overlay as a cluster is given it."""

    def __init__(self, directory: Path) -> None:
        self.resources = render(directory)

    def all(self, kind: str) -> list[Resource]:
        return [resource for resource in self.resources if resource["kind"] == kind]

    def one(self, kind: str, name: str = "a2sf") -> Resource:
        (found,) = [r for r in self.all(kind) if r["metadata"]["name"] == name]
        return found

    @property
    def pods(self) -> list[Resource]:
        """The specifications of the pods of everything that makes any."""
        made = [r for r in self.resources if r["kind"] in ("Deployment", "StatefulSet", "Job")]
        return [resource["spec"]["template"]["spec"] for resource in made]

    @property
    def deployment(self) -> Resource:
        return dict(self.one("Deployment")["spec"])

    @property
    def pod(self) -> Resource:
        return dict(self.deployment["template"]["spec"])

    @property
    def container(self) -> Resource:
        (container,) = self.pod["containers"]
        return dict(container)

    @property
    def settings(self) -> dict[str, str]:
        """What the service's variables hold in a pod: the image's, and the manifests' over them."""
        (source,) = self.container["envFrom"]
        given = self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        own = {name: value for name, value in image().items() if name.startswith(ENV_PREFIX)}
        return {**own, **given}

    @property
    def arguments(self) -> list[str]:
        """What follows the image's entry point: its own arguments are for pods that have none."""
        return list(self.container.get("args") or json.loads(last("service", "CMD")))


def image() -> dict[str, str]:
    """The variables that the service's image sets."""
    words = [word for name, rest in inherited("service") if name == "ENV" for word in rest.split()]
    return dict(word.split("=", 1) for word in words)


def all_containers(pod: Resource) -> list[Resource]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def settled(overlay: Rendered, monkeypatch: pytest.MonkeyPatch) -> ServerOptions:
    """What the server makes of the overlay's settings, which stay in the environment."""
    for name, value in overlay.settings.items():
        monkeypatch.setenv(name, value)
    return load([]).options
