"""Would the tests notice? Small changes of the code, one at a time, and the tests that fail for them.

Of `stability`, `eigen`, `flow` and `control`: comparison, arithmetic and Boolean operators are exchanged, numbers
changed, conditions turned round, statements left out. Torch is imported once, and each mutant tested in a fork of that
process, with the module's own tests, until one fails. Ready-made tools start an interpreter for each mutant, ten
seconds here. Writes mutation.json. Run (hours):
OMP_NUM_THREADS=1 python -m benchmarks.mutation [--count 100] [MODULE …]
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TESTS = {
    "stability": ["tests/core/test_stability.py"],
    "eigen": ["tests/core/test_eigen.py"],
    "flow": ["tests/core/test_flow.py"],
    "control": ["tests/core/test_control.py"],
}
PATIENCE = 300  # seconds; a mutant that takes longer counts as found
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


def survives(module: Any, tree: ast.Module, tests: list[str]) -> tuple[bool, str]:
    """Whether the tests pass with the changed module, in a fork; and the test that failed, or why it ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(PATIENCE)
        failed: list[str] = []
        try:
            exec(compile(tree, module.__file__, "exec"), module.__dict__)
            _renew(module)
            import pytest

            class Watch:
                def pytest_runtest_logreport(self, report: Any) -> None:
                    if report.failed:
                        failed.append(report.nodeid)

            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[Watch()]))
        except BaseException as error:
            code, failed = 1, [type(error).__name__]
        os.write(write, json.dumps([code, failed[:1]]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if not said:
        return False, "it ran too long, or broke the process"
    code, failed = json.loads(said)
    return code == 0, failed[0] if failed else ""


def _renew(module: Any) -> None:
    """Whoever has imported a name of the module gets the changed one."""
    import gfs_core

    new = {k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    for other in [m for name, m in sys.modules.items() if name.startswith("gfs_core") and m is not module] + [gfs_core]:
        for name, value in list(vars(other).items()):
            if name in new and value is not new[name] and getattr(value, "__module__", "") == module.__name__:
                setattr(other, name, new[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("modules", nargs="*", default=list(TESTS), metavar="MODULE")
    parser.add_argument("--count", type=int, default=100, help="of each module, drawn at random (seed 0)")
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    import importlib

    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch

    import gfs_core  # noqa: F401

    torch.set_num_threads(1)
    file = given.out / "mutation.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in given.modules:
        module = importlib.import_module(f"gfs_core.{name}")
        tree = ast.parse(Path(str(module.__file__)).read_text())
        assert survives(module, tree, TESTS[name])[0], f"the tests of {name} fail as it is"
        possible = list(mutants(tree))
        drawn = random.Random(0).sample(possible, min(given.count, len(possible)))
        rows = []
        for changed, line, before, after in drawn:
            begin = time.perf_counter()
            lives, by = survives(module, changed, TESTS[name])
            rows.append({"line": line, "before": before[:120], "after": after[:120], "survived": lives, "by": by})
            print(
                name,
                len(rows),
                "survived" if lives else by,
                f"{time.perf_counter() - begin:.0f} s",
                rows[-1],
                flush=True,
            )
            results[name] = {"possible": len(possible), "mutants": rows}
            file.write_text(json.dumps(results, indent=1) + "\n")
        killed = sum(not r["survived"] for r in rows)
        print(f"{name}: {killed} of {len(rows)} found", flush=True)


if __name__ == "__main__":
    main()
