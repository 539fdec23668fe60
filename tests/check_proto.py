"""Fails when the committed protobuf code differs from what `make proto` would write now."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def drifted(root: Path = ROOT) -> list[str]:
    """Names of the generated files that are missing or stale."""
    stale: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((root / "cluster" / "proto").glob("*.proto")):
            relative = source.relative_to(root)
            outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
            if protoc.main(["protoc", f"-I{root}", *outputs, str(relative)]) != 0:
                return [str(relative)]
            for suffix in SUFFIXES:
                name = relative.with_name(relative.stem + suffix)
                committed = root / name
                fresh = (Path(folder) / name).read_bytes()
                if not committed.is_file() or committed.read_bytes() != fresh:
                    stale.append(str(name))
    return stale


if __name__ == "__main__":
    names = drifted()
    if names:
        sys.exit(f"Generated code is stale, run `make proto`: {', '.join(names)}")
