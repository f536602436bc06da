"""What a user meets whose environment lacks an optional part: the packages themselves are left out of the path."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_without(folder: Path, missing: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.suffix != ".pth" and not entry.name.startswith((*missing, "__editable__")):
            (folder / entry.name).symlink_to(entry)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def test_the_core_needs_torch_alone(tmp_path: Path) -> None:
    everything_else = ("lightning", "pytorch_lightning", "bokeh", "jinja2", "typer", "rich", "sklearn", "wandb")
    code = (
        "import torch, gfs_core; model, x = torch.nn.Linear(1, 1), torch.ones(1, 1); "
        "print(gfs_core.sharpness(model, lambda m, b: m(b).sum() ** 2, x).value)"
    )
    done = run_without(tmp_path, everything_else, code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(4.0)  # (w + b)²: Hessian 2·[[1, 1], [1, 1]]


def test_lightning_is_named_where_it_is_missing(tmp_path: Path) -> None:
    done = run_without(tmp_path, ("lightning", "pytorch_lightning"), "import lightning_gfs")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: lightning_gfs needs Lightning: pip install 'gfs-sharpness[lightning]'"
    )


def test_transformers_is_named_where_it_is_missing(tmp_path: Path) -> None:
    done = run_without(tmp_path, ("transformers", "accelerate"), "import hf_gfs")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: hf_gfs needs transformers: pip install 'gfs-sharpness[hf]'"
    )


@pytest.mark.parametrize(
    ("package", "other"), [("hf_gfs", ("lightning", "pytorch_lightning")), ("lightning_gfs", ("transformers",))]
)
def test_each_adapter_works_without_the_other_framework(tmp_path: Path, package: str, other: tuple[str, ...]) -> None:
    done = run_without(tmp_path, other, f"from {package} import GFSCallback; print(GFSCallback(every=3).config.every)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"


@pytest.mark.parametrize("missing", ["typer", "bokeh", "sklearn"])
def test_the_command_names_what_it_lacks(tmp_path: Path, missing: str) -> None:
    code = "import sys; sys.argv = ['gfs', 'demo', '--quick']; from gfs_report import main; main()"
    done = run_without(tmp_path, (missing,), code)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert missing in done.stderr
    assert "pip install 'gfs-sharpness[demo]'" in done.stderr
