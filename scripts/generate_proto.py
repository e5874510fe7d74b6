"""Generates the Python code of the proto files into `service/pb/`.

Run it after every change under `proto/`: `python scripts/generate_proto.py`. A test generates into
an empty folder and compares, so the code always matches the contract.

protoc gets the proto's folder under the name `service/pb`. Its real path would become the import
`from a2sf.inference.v1 import ...` and collide with the core package.
"""

import argparse
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "proto" / "a2sf" / "inference" / "v1"


def generate(out: Path) -> None:
    """Write `service/pb/*_pb2.py`, their stubs and the gRPC code below `out`."""
    with resources.as_file(resources.files("grpc_tools") / "_proto") as well_known:
        subprocess.run(
            [
                sys.executable,
                *("-m", "grpc_tools.protoc"),
                f"-Iservice/pb={SOURCE}",
                f"-I{well_known}",
                f"--python_out={out}",
                f"--grpc_python_out={out}",
                # Stubs of both by mypy-protobuf, whose plugins protoc finds on the PATH. They pass
                # the strict checks and contain the proto's comments.
                f"--mypy_out=quiet:{out}",
                f"--mypy_grpc_out=quiet:{out}",
                *(f"service/pb/{file.name}" for file in sorted(SOURCE.glob("*.proto"))),
            ],
            check=True,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}"},
        )


def main() -> None:
    """Generate in place, or below `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT, help="where service/pb/ is written")
    generate(parser.parse_args().out)


if __name__ == "__main__":
    main()
