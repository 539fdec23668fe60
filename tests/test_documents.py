"""What the documents say can be followed: links, options, targets, and figures as measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from baton.__main__ import ROOMS
from baton.admin import COMMANDS
from baton.admin_options import AdminConfig
from baton.doctor import DoctorConfig
from baton.serve import SECTIONS
from benchmarks.readme_figures import README, RESULTS, with_figures
from cluster.member_config import MemberConfig
from cluster.options import options_of
from loadtest.config import BenchConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "deploy/README.md", "kv_transfer/PROTOCOL.md"]
# Those that have a map of their own.
INNER_ROOMS = sorted(
    str(path.parent.relative_to(ROOT))
    for room in ROOMS
    for path in (ROOT / room).glob("*/__init__.py")
    if path.stat().st_size
)
# Of other programs, or of every program.
OTHER_FLAGS = {
    *("--help", "--help-all", "--config", "--show-config"),
    *("--minutes", "--seed"),  # tests.faults.soak
    *("--profile", "--build"),  # docker compose
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    here = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", here.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (here.parent / path).resolve() if path else here
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_options_are_those_that_there_are(name: str) -> None:
    of_admin = [each for command in COMMANDS for each in command.options]
    programs = (MemberConfig, BenchConfig, DoctorConfig, AdminConfig)
    sections: tuple[type, ...] = (*SECTIONS, *programs, *of_admin)
    known = OTHER_FLAGS | {each.flag for section in sections for each in options_of(section)}
    text = (ROOT / name).read_text()
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_programs_that_are_named_are_there(name: str) -> None:
    here, text = (ROOT / name).parent, (ROOT / name).read_text()
    for path in re.findall(r"`([\w*]+(?:/[\w*]+)+\.py)`", text):
        assert any(ROOT.glob(path)) or any(here.glob(path)), path
    for module in re.findall(r"python -m ([\w.]+)", text):
        path = module.replace(".", "/")
        assert (ROOT / f"{path}.py").exists() or (ROOT / path / "__main__.py").exists(), module


def test_make_has_the_targets_that_the_readme_names() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)) <= targets


def test_figures_of_the_readme_are_those_that_are_published() -> None:
    """After a change of results: `python -m benchmarks.readme_figures`."""
    readme = README.read_text()
    assert with_figures(readme, RESULTS.read_text()) == readme


@pytest.mark.parametrize("room", [*ROOMS, *INNER_ROOMS])
def test_the_map_of_a_room_names_all_of_its_files(room: str) -> None:
    text = (ROOT / room / "__init__.py").read_text()
    files = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__", "__main__"}
    assert sorted(name for name in files if not re.search(rf"\b{name}\b", text)) == []


def test_the_map_of_the_benchmarks_names_all_of_their_files() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert sorted(name for name in names if f"`{name}`" not in text) == []
