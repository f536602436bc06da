"""Would the tests notice? Small changes of the code, one at a time, and the tests that fail for them.

Of the modules in ``TESTS``: comparison, arithmetic and Boolean operators are exchanged, numbers
changed, conditions turned round, statements left out. What the tests need is imported once; each mutant is tested in a
fork of that process, where `gfs_core` is imported with the change, by the module's own tests, until one fails. The
ready-made tools start an interpreter for each mutant, ten seconds with torch. Adds to mutation.json, and writes
mutation.md from it and from mutation_survivors.json, where each mutant that no test finds is explained.
Run (hours): OMP_NUM_THREADS=1 python -m benchmarks.mutation [--count 40] [MODULE …], for example gfs_core.linalg.eigen
"""

from __future__ import annotations

import argparse
import ast
import copy
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hypothesis
import pytest
import sklearn.datasets  # noqa: F401
import torch

from benchmarks.lib.store import FOLDER, Store
from benchmarks.lib.tables import table

CODE = FOLDER.parent
DETECTORS = ("test_detectors", "test_early_warning", "test_alarm_ends", "test_profile")
TESTS = {  # of each module
    "gfs_core.optimizers.thresholds": ["tests/core/test_stability.py"],
    "gfs_core.linalg.eigen": ["tests/core/test_eigen.py"],
    "gfs_core.linalg.lanczos": ["tests/core/test_eigen.py"],
    "gfs_core.linalg.chebyshev": ["tests/core/test_flow.py"],
    "gfs_core.loss.flow": ["tests/core/test_flow.py"],
    "gfs_core.actions.rate": ["tests/core/test_control.py"],
    **{
        f"gfs_core.detectors.{name}": [f"tests/core/{test}.py" for test in DETECTORS]
        for name in ("baseline", "early_warning", "edge", "loss", "rate", "trend")
    },
}
# Tests that take minutes; run where the others pass.
SLOW = dict.fromkeys(("gfs_core.linalg.chebyshev", "gfs_core.loss.flow"), "full_solution_of_scalar or kinks_do")
PATIENCE = 3  # times what the tests take as it is, and 20 s; a mutant that takes longer counts as found
COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}


def mutants(tree: ast.Module) -> Iterator[tuple[ast.Module, int, str, str]]:
    """Each tree with one change; the line, what stood there and what stands there now."""
    spots = [n for n in ast.walk(tree) if not isinstance(n, ast.Module)]
    texts = {id(n.value) for n in spots if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    annotations = {
        id(inner)
        for n in spots
        for note in (getattr(n, "annotation", None), getattr(n, "returns", None))
        if note is not None
        for inner in ast.walk(note)
    }
    for place, node in enumerate(spots):
        if id(node) in texts or id(node) in annotations:
            continue
        for change in _changes(node):
            changed = copy.deepcopy(tree)
            target = [n for n in ast.walk(changed) if not isinstance(n, ast.Module)][place]
            before = ast.unparse(node)
            new = change(target)
            if new is not target:
                _Replace(target, new).visit(changed)
            ast.fix_missing_locations(changed)
            yield changed, getattr(node, "lineno", 0), before, ast.unparse(new)


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


def _changes(node: ast.AST) -> Iterator[Any]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        yield lambda n: _set(n, "ops", [COMPARED[type(n.ops[0])](), *n.ops[1:]])
    if isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        yield lambda n: _set(n, "op", COMPUTED[type(n.op)]())
    if isinstance(node, ast.BoolOp):
        yield lambda n: _set(n, "op", ast.Or() if isinstance(n.op, ast.And) else ast.And())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield lambda n: n.operand
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield lambda n: _set(n, "value", n.value + 1 if type(n.value) is int else n.value * 1.5 + 0.1)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield lambda n: _set(n, "value", not n.value)
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield lambda n: _set(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, (ast.AugAssign, ast.Continue, ast.Break)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield lambda n: ast.Pass()


def _set(node: Any, name: str, value: Any) -> Any:
    setattr(node, name, value)
    return node


@dataclass
class Outcome:
    """What the tests said of a mutant."""

    survived: bool
    by: str  # the test that failed, or why the process ended
    seconds: float


def tested(name: str, tree: ast.Module, tests: list[str], limit: float) -> Outcome:
    """The tests, in a fork, with the module ``name`` made of ``tree``."""
    begin = time.perf_counter()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.setitimer(signal.ITIMER_REAL, limit)  # SIGALRM ends the process
        os.write(write, json.dumps(_in_fork(name, tree, tests)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    code, by = json.loads(said) if said else (1, f"ended by {signal.Signals(os.WTERMSIG(status)).name}")
    return Outcome(code == 0, by, time.perf_counter() - begin)


def _in_fork(module: str, tree: ast.Module, tests: list[str]) -> tuple[int, str]:
    """Pytest's exit code and the first test that failed."""
    failed = []

    class Watch:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)

    as_it_is = SourceFileLoader.get_code

    def changed(loader: SourceFileLoader, fullname: str) -> Any:
        return compile(tree, loader.path, "exec") if fullname == module else as_it_is(loader, fullname)

    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider"]
    try:
        with (
            patch.object(SourceFileLoader, "get_code", changed),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            code = int(pytest.main([*options, *tests], plugins=[Watch()]))
    except BaseException as error:
        return 1, type(error).__name__
    return code, failed[0] if failed else f"pytest ended with {code}"


HEAD = """# Mutation test

    OMP_NUM_THREADS=1 python -m benchmarks.mutation

One small change of the code at a time (an operator exchanged, a number changed, a condition turned round, a
statement left out), drawn at random from all that are possible, and the module's own tests alone: do they
fail? A change that makes the tests run three times as long, without an end, counts as found. Of a first draw
of 50 in the solver 26 were found; tests were written for the others, and for what later draws have left, and *found* is
after that. For most of the survivors no test could tell: the program is the same, or it differs where two floats are
equal; or a setting is a little different.
"""


def render(results: dict[str, Any]) -> str:
    """The page, with the reasons in mutation_survivors.json."""
    why = FOLDER / "mutation_survivors.json"
    reasons = json.loads(why.read_text()) if why.exists() else {}
    scores, survived = [], []
    for name, result in results["modules"].items():
        rows = result["mutants"]
        found = sum(not row["survived"] for row in rows)
        scores.append([f"`{name}`", result["possible"], len(rows), found, f"{found / len(rows):.0%}"])
        for row in rows:
            if row["survived"]:
                cells = [f"`{row[k]}`".replace("|", "\\|").replace("\n", " ") for k in ("before", "after")]
                survived.append([f"`{name}`", *cells, reasons.get(key(name, row), "not looked into")])
    lines = [
        HEAD, *table(["module", "possible", "drawn", "found", "score"], scores), "",
        "## What no test found", "", *table(["module", "was", "became", "why"], survived),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def key(name: str, row: dict[str, Any]) -> str:
    """Of a mutant, in mutation_survivors.json."""
    return f"{name}, line {row['line']}: {row['before']} -> {row['after']}"


def main() -> None:
    """Test the mutants, print each, write after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("modules", nargs="*", default=list(TESTS), metavar="MODULE")
    parser.add_argument("--count", type=int, default=40, help="of each module, drawn at random (seed 0)")
    parser.add_argument("--again", action="store_true", help="only those that survived, after tests were added")
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    torch.set_num_threads(1)
    hypothesis.settings.register_profile("same each time", derandomize=True, database=None)
    hypothesis.settings.load_profile("same each time")
    assert not any(name.startswith(("gfs_core", "tests")) for name in sys.modules)
    store = Store("mutation", given.out)
    results: dict[str, Any] = store.results.get("modules", {})
    for name in given.modules:
        tree = ast.parse((CODE / f"{name.replace('.', '/')}.py").read_text())
        parts = [["-k", f"not ({SLOW[name]})"], ["-k", SLOW[name]]] if name in SLOW else [[]]
        plain = [tested(name, tree, [*TESTS[name], *part], 3600) for part in parts]
        assert all(p.survived for p in plain), f"the tests of {name} fail as it is: {plain}"
        limits = [PATIENCE * p.seconds + 20 for p in plain]
        possible = list(mutants(tree))
        drawn = random.Random(0).sample(possible, min(given.count, len(possible)))
        rows = results.get(name, {}).get("mutants", []) if given.again else []
        print(
            f"{name}: {len(possible)} possible, {sum(p.seconds for p in plain):.0f} s for the tests as it is",
            flush=True,
        )
        for changed, line, before, after in drawn:
            row: dict[str, Any] = {"line": line, "before": before[:120], "after": after[:120]}
            old = [r for r in rows if given.again and key(name, r) == key(name, row)]
            if old and not old[0]["survived"]:
                continue
            for part, limit in zip(parts, limits, strict=True):
                outcome = tested(name, changed, [*TESTS[name], *part], limit)
                if not outcome.survived:
                    break
            row |= {"survived": outcome.survived, "by": outcome.by}
            if old:
                old[0].update(row)
            else:
                rows.append(row)
            print(name, f"{outcome.seconds:.0f} s", row, flush=True)
            results[name] = {"possible": len(possible), "mutants": rows}
            store.put("modules", results)
        store.write_page(render(store.results))


if __name__ == "__main__":
    main()
