"""What is built: the wheel, from the tree and from the sdist, and the versions that it asks for."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PACKAGES = ("gfs_core", "lightning_gfs", "hf_gfs", "gfs_report")


def built(target: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True, timeout=60)
    (path,) = out.iterdir()
    return path


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def files(package: str) -> set[str]:
    inside = (path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in inside}


def test_the_wheel_holds_the_packages_and_the_sdist_builds_the_same(tmp_path: Path) -> None:
    wheel = contents(built("wheel", ROOT, tmp_path / "wheel"))
    information = {name: data for name, data in wheel.items() if ".dist-info/" in name}
    assert wheel.keys() - information.keys() == set().union(*map(files, PACKAGES))
    assert {f"{package}/py.typed" for package in PACKAGES} <= wheel.keys()
    by_name = {name.partition("/")[2]: data for name, data in information.items()}
    assert by_name["licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"\nLicense-Expression: Apache-2.0\n" in by_name["METADATA"]
    assert re.findall(rb"^Requires-Dist: ([\w-]+)\S*$", by_name["METADATA"], re.M) == [b"torch"]  # without an extra
    assert by_name["entry_points.txt"] == b"[console_scripts]\ngfs = gfs_report:main\n"

    with tarfile.open(built("sdist", ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert contents(built("wheel", source, tmp_path / "again")) == wheel


def test_the_table_of_versions_is_that_of_the_bounds_and_of_the_tested_set() -> None:
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *(need for extra in project["optional-dependencies"].values() for need in extra)]
    bounds: dict[str, set[Version]] = {}
    for need in map(Requirement, needs):
        bounds.setdefault(need.name, set()).update(Version(one.version) for one in need.specifier)
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))

    table = (ROOT / "README.md").read_text().partition("\n## Versions\n")[2].partition("\n\n[")[0]
    titles, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\|.*", table, re.M))
    oldest, tested, newest = (dict(zip(titles, row, strict=True)) for row in rows)
    assert Version(oldest["Python"]) in SpecifierSet(f"=={project['requires-python'].removeprefix('>=')}.*")
    for name in titles[2:6]:
        assert bounds[name] == {Version(oldest[name])}
        assert tested[name] == pins[name]
        assert Version(tested[name]) <= Version(newest[name])
