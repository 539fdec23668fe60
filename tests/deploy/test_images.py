"""The Dockerfiles, read the way BuildKit reads them: instructions, with lines joined."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

INSTRUCTIONS = {"FROM", "RUN", "COPY", "ENV", "ARG", "USER", "WORKDIR", "EXPOSE"}
INSTRUCTIONS |= {"ENTRYPOINT", "CMD"}
IMAGES = ("gateway", "node")


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str


def read_dockerfile(path: Path) -> list[Instruction]:
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [Instruction(name, text) for name, text in found]


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest, deploy: Path) -> list[Instruction]:
    return read_dockerfile(deploy / "docker" / f"{request.param}.Dockerfile")


def texts(image: list[Instruction], name: str) -> list[str]:
    return [each.text for each in image if each.name == name]


def test_dockerfiles_hold_known_instructions_and_begin_with_a_base(
    image: list[Instruction],
) -> None:
    assert {each.name for each in image} <= INSTRUCTIONS
    assert next(each.name for each in image if each.name != "ARG") == "FROM"


def test_images_run_as_a_numbered_user_under_tini(image: list[Instruction]) -> None:
    last_stage = image[max(i for i, each in enumerate(image) if each.name == "FROM") :]
    assert texts(last_stage, "USER") == ["10001"]
    assert texts(last_stage, "ENTRYPOINT") == ['["tini", "--", "baton"]']
    assert any("tini" in run and "useradd --uid 10001" in run for run in texts(last_stage, "RUN"))


def test_extras_that_images_install_exist(image: list[Instruction], root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    defaults = dict(arg.split("=", 1) for arg in texts(image, "ARG") if "=" in arg)
    (installed,) = re.findall(r'"\.\[(.+?)\]"', " ".join(texts(image, "RUN")))
    extra = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], installed)
    assert extra in project["optional-dependencies"]


def test_the_gateway_image_has_no_torch(deploy: Path, root: Path) -> None:
    text = (deploy / "docker" / "gateway.Dockerfile").read_text()
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    packages = project["dependencies"] + project["optional-dependencies"]["gateway"]
    assert ".[gateway]" in text
    assert not [name for name in packages if name.startswith(("torch", "triton", "ucxx"))]


def test_the_pinned_torch_is_the_one_of_the_project(deploy: Path, root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    text = (deploy / "docker" / "node.Dockerfile").read_text()
    (pinned,) = re.findall(r'"(torch[<>=].+?)"', text)
    assert pinned in project["optional-dependencies"]["node"]


@pytest.mark.parametrize("name", IMAGES)
def test_the_build_context_has_all_packages_and_what_pyproject_names(
    name: str, deploy: Path, root: Path
) -> None:
    """The ignore file lets through only what it lists; a new room must be added to it."""
    ignore = (deploy / "docker" / f"{name}.Dockerfile.dockerignore").read_text().splitlines()
    let_through = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    assert all((root / path).exists() for path in let_through)
    config = tomllib.loads((root / "pyproject.toml").read_text())
    packages = config["tool"]["setuptools"]["packages"]["find"]["include"]
    needed = {package.rstrip("*") for package in packages}
    needed |= {config["project"]["readme"], *config["project"]["license-files"], "pyproject.toml"}
    assert needed <= let_through
