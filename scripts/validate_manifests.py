"""Renders every Kubernetes overlay as `kubectl apply -k` would, and validates it with the schemas.

Owns the supported versions of Kubernetes. A kind without a schema must be listed here; its operator
validates it.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

MANIFESTS = Path(__file__).resolve().parents[1] / "docker" / "kubernetes"

OLDEST, NEWEST = "1.33", "1.37"
"""Both versions must accept the manifests. In the oldest, a Job's successPolicy and
backoffLimitPerIndex are stable."""

CUSTOM = {("monitoring.coreos.com/v1", "ServiceMonitor")}
"""Kinds defined by an operator, by version and name."""

# The environment's kubectl, even if there are others.
KUBECTL = Path(sysconfig.get_path("scripts")) / "kubectl"


def kustomizations() -> list[Path]:
    """Directories that can be applied; components can only be part of one."""
    files = MANIFESTS.rglob("kustomization.yaml")
    return sorted(f.parent for f in files if yaml.safe_load(f.read_text())["kind"] != "Component")


def render(directory: Path) -> list[dict[str, Any]]:
    """Return the resources of a kustomization.

    Raises CalledProcessError with kustomize's messages.
    """
    rendered = subprocess.run(
        [KUBECTL, "kustomize", directory], check=True, capture_output=True, text=True
    )
    return list(yaml.safe_load_all(rendered.stdout))


def problems(resource: dict[str, Any]) -> list[str]:
    """The errors of a resource under the schemas of the oldest and the newest version."""
    found = []
    for version in (OLDEST, NEWEST):
        try:
            kubernetes_validate.validate(resource, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            if (resource["apiVersion"], resource["kind"]) not in CUSTOM:
                found.append(f"Kubernetes {version} has no {resource['kind']} of this version")
        except kubernetes_validate.ValidationError as error:
            where = ".".join(map(str, error.path))
            found.append(f"{where}: {error.message} (Kubernetes {version})")
    return found


def main() -> int:
    """Check all resources; return the number of invalid ones."""
    wrong = 0
    for directory in kustomizations():
        try:
            resources = render(directory)
        except subprocess.CalledProcessError as error:
            print(f"{directory}: {error.stderr.strip()}", file=sys.stderr)
            wrong += 1
            continue
        for resource in resources:
            found = problems(resource)
            wrong += bool(found)
            for problem in found:
                name = f"{resource['kind']} {resource['metadata']['name']}"
                print(f"{directory.name}: {name}: {problem}", file=sys.stderr)
        print(f"{directory.relative_to(MANIFESTS)}: {len(resources)} resources")
    return wrong


if __name__ == "__main__":
    sys.exit(main() > 0)
