"""Which package of the core may import which: the arrows of the design."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import gfs_core

ROOT = Path(gfs_core.__file__).parent
GROUND = {"errors", "config"}  # whatever the core's other modules and packages may import; config knows errors alone
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "linalg": GROUND,
    "loss": GROUND | {"linalg"},
    "optimizers": GROUND | {"linalg"},
    "signals": GROUND | {"linalg", "loss", "optimizers"},
    "detectors": GROUND | {"signals.base", "signals.training"},  # readings, and those of a loss and a rate
    "actions": GROUND | {"detectors.base"},  # alerts
    "search": GROUND | {"linalg", "loss", "optimizers", "run"},
    "run": GROUND | {"linalg", "loss", "optimizers", "signals", "detectors", "actions"},
}
PUBLIC = {"__init__", "metrics", "help", "charts", "api"}  # at the top, for users: they may import everything


def modules() -> dict[str, set[str]]:
    """What each module of the core imports of it, both by their names without ``gfs_core.``."""
    names = {str(file.relative_to(ROOT).with_suffix("")).replace("/", "."): file for file in ROOT.rglob("*.py")}
    return {name: set(_imported(file, set(names))) for name, file in names.items()}


def _imported(file: Path, names: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]  # `from package import module`
            found = [n if n.removeprefix("gfs_core.") in names else str(node.module) for n in inside]
        yield from (n.removeprefix("gfs_core.") for n in found if n.startswith("gfs_core"))


def package(name: str) -> str:
    return name.partition(".")[0]


def allowed(importer: str, imported: str) -> bool:
    if package(importer) in PUBLIC:
        return True
    return bool({imported, package(imported)} & (ALLOWED[package(importer)] | {package(importer)}))


def violations() -> set[tuple[str, str]]:
    return {(name, other) for name, found in modules().items() for other in found if not allowed(name, other)}


def test_every_package_imports_those_below_it_alone() -> None:
    assert violations() == set()


def test_every_entry_of_the_table_is_needed() -> None:
    used = {(package(name), other) for name, found in modules().items() for other in found}
    used |= {(importer, package(other)) for importer, other in used}
    assert {(importer, other) for importer, held in ALLOWED.items() for other in held - GROUND} <= used


def test_every_package_is_in_the_table() -> None:
    assert {package(name) for name in modules()} - PUBLIC == set(ALLOWED)


def test_no_module_imports_itself_in_a_circle() -> None:
    TopologicalSorter(modules()).prepare()  # raises CycleError


def test_the_packages_have_an_order() -> None:
    order = list(TopologicalSorter({name: map(package, held) for name, held in ALLOWED.items()}).static_order())
    assert order.index("linalg") < order.index("loss") < order.index("signals") < order.index("run")
