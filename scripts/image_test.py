"""Builds both images without a container engine, and runs them as an unknown user would.

`make image-test`. Builds docker/Dockerfile with buildah on a Debian base made by mmdebstrap, then
runs the images with runc: as a user that no file defines, on a read-only root file system, without
capabilities and without a network. A table is fitted in one image and served in the other. Owns
building, running and removing all of this; tests/docker checks the other properties of the images.
Needs root, and several packages, which it names if they are missing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time

from scripts.image_workshop import Failed, Workshop, say

PROGRAMS = ("buildah", "mmdebstrap", "runc")

PROMPT = "Once upon a time"


def main() -> None:
    """Build, run, report, remove."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--torch-index-url", help="where PyTorch's wheel comes from")
    options = parser.parse_args()
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        sys.exit(
            f"image-test: {', '.join(missing)} not installed; on Debian and Ubuntu: "
            f"apt-get install {' '.join(PROGRAMS)}"
        )
    if os.geteuid() != 0:
        sys.exit("image-test: building a root file system needs root; run it as root")
    began = time.monotonic()
    try:
        with Workshop.opened() as workshop:
            workshop.make_base(options.accelerator)
            for target in ("tuner", "service"):
                workshop.build(target, options.accelerator, options.torch_index_url)
                say(f"{target}: built, {workshop.sizes(target)}")
            try_out(workshop)
    except Failed as failure:
        sys.exit(f"image-test: {failure}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"image-test: {error.cmd[0]} failed with exit code {error.returncode}")
    say(f"all checks passed after {time.monotonic() - began:.0f} s")


def try_out(workshop: "Workshop") -> None:
    """Fit a table in one image, serve it in the other, and stop the server."""
    tables = workshop.volume("tuner", "/tables")
    with workshop.container("tuner") as run:
        if "--help" not in run(["--help"]):
            raise Failed("the tuner's --help does not print its help")
        fit = ["--dataset", "recall", "--length", "96", "--examples", "2", "--holdout", "2"]
        run([*fit, "--trials", "1", "--stages", "heads", "--out", "/tables/tried.json"], tables)
        shown = run(["tables", "show", "/tables/tried.json"], tables)
        say(f"tuner: fitted {shown.splitlines()[0]}")
    with workshop.server(["--model", "reference", "--tables", "/tables"], tables) as ask:
        client = ["python", "-m", "service.client", PROMPT, "--max-new-tokens", "20"]
        answer = ask([*client, "--temperature", "0", "--table", "tried", "--budget", "32"])
        if "20 tokens" not in answer:
            raise Failed(f"the completion has not the 20 tokens asked for: {answer!r}")
        say(f"service: {PROMPT}{answer.splitlines()[0]} ...")
        say("service: " + ask(["python", "-c", INVENTORY]).strip())


INVENTORY = """
from importlib.metadata import distributions
found = {each.metadata["Name"]: each.version for each in distributions()}
print(f"a2sf-serve {found['a2sf-serve']}, torch {found['torch']}, {len(found)} distributions")
"""
"""Reads the data for a bill of materials; raises KeyError if the metadata is missing."""


if __name__ == "__main__":
    main()
