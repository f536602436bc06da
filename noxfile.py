"""The supported versions and the packages that are built, each in an environment of its own: one command, `nox`.

    pip install 'nox[uv]'
    nox                  # all of it: gigabytes to install, about an hour on two cores
    nox -s package       # what is built, installed alone

`oldest` takes the lower bounds of pyproject.toml, `newest` what the package index has. The table in the README is what
they were run with.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"

TESTS = (
    "tests/core",
    "tests/lightning",
    "tests/hf/test_callback.py",
    "tests/hf/test_control.py",
    "tests/report/test_runs.py",
    "tests/report/test_report.py",
    "gfs_core",
)
TOOLS = (
    "pytest",
    "hypothesis",
    "pytest-xdist",
    "jsonargparse[signatures]>=4.39",
    "wandb",
    "schedulefree",
    "playwright",
    "axe-playwright-python",
)
VERSIONS = """
import platform, accelerate, lightning, torch, transformers
print("ran with Python", platform.python_version())
for module in torch, lightning, transformers, accelerate:
    print("ran with", module.__name__, module.__version__)
"""
SHARPNESS = """
import torch, gfs_core
model, x = torch.nn.Linear(1, 1), torch.ones(1, 1)
value = gfs_core.sharpness(model, lambda m, b: m(b).sum() ** 2, x).value  # (w + b)^2: Hessian 2 [[1, 1], [1, 1]]
assert abs(value - 4) < 1e-4, value
"""
REFUSED = """
try:
    import {package}
except ModuleNotFoundError as error:
    assert str(error) == "{package} needs {name}: pip install 'gfs-sharpness[{extra}]'", error
else:
    raise SystemExit("{package} was imported without {name}")
"""
LIGHTNING = """
import lightning as L, torch
from lightning_gfs import GFSCallback

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)
    def training_step(self, batch, index):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

callback = GFSCallback(every=2, history="history.jsonl")
trainer = L.Trainer(accelerator="cpu", max_steps=6, callbacks=[callback], logger=False, enable_checkpointing=False,
                    enable_progress_bar=False)
trainer.fit(Net(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 4)), 8))
import gfs_core
assert any(m.stability_ratio for m in gfs_core.read_history("history.jsonl"))
"""
HUGGING_FACE = """
import torch
from transformers import Trainer, TrainingArguments
from hf_gfs import GFSCallback

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)
    def forward(self, x, labels=None):
        return {"loss": self.net(x).square().mean()}

arguments = TrainingArguments("out", max_steps=6, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True)
trainer = Trainer(Net(), arguments, train_dataset=[{"x": torch.randn(4), "labels": 0} for _ in range(64)])
trainer.add_callback(GFSCallback(every=2, history="history.jsonl"))
trainer.train()
import gfs_core
assert any(m.stability_ratio for m in gfs_core.read_history("history.jsonl"))
"""


@nox.session(python="3.11")
def package(session: nox.Session) -> None:
    """Wheel and sdist: built, checked, and each installed alone, with torch only and with one framework only."""
    shutil.rmtree("dist", ignore_errors=True)
    session.install("build", "twine", "hatchling")
    session.run("python", "-m", "build", "--no-isolation", "--outdir", "dist", silent=True)
    built = sorted(Path("dist").glob("gfs_sharpness-*"))
    session.run("twine", "check", "--strict", *map(str, built))
    folder = session.create_tmp()
    torch = "torch" if not session.posargs else session.posargs[0]  # `nox -s package -- torch==2.13.0`
    lightning, hf = ("lightning_gfs", "Lightning", "lightning"), ("hf_gfs", "transformers", "hf")
    for what, extra, works, missing in (
        (built[0], "", SHARPNESS, (lightning, hf)),
        (built[1], "", SHARPNESS, (lightning, hf)),
        (built[0], "[lightning]", LIGHTNING, (hf,)),
        (built[0], "[hf]", HUGGING_FACE, (lightning,)),
    ):
        home = Path(folder) / "alone"
        session.run("uv", "venv", "--quiet", "--clear", "--python", "3.11", str(home), external=True)
        python = str(home / "bin" / "python")
        install = ["uv", "pip", "install", "--quiet", "--python", python, torch, f"{what.resolve()}{extra}"]
        session.run(*install, external=True)
        with session.chdir(folder):
            Path("history.jsonl").unlink(missing_ok=True)
            session.run(python, "-W", "ignore", "-c", works, external=True)
            for name, framework, its in missing:
                session.run(python, "-c", REFUSED.format(package=name, name=framework, extra=its), external=True)
        session.log(f"{what.name}{extra}, installed alone: works")


def test(session: nox.Session) -> None:
    """Say what there is, and run the tests."""
    session.run("python", "-W", "ignore", "-c", VERSIONS)
    session.run("pytest", "-n", "2", "--dist", "loadfile", *(session.posargs or TESTS), env={"OMP_NUM_THREADS": "1"})


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """The lower bounds."""
    session.install("--resolution", "lowest-direct", "-e", ".[all]")
    session.install(*TOOLS)
    test(session)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """What the package index has."""
    session.install("--upgrade", "-e", ".[all]", *TOOLS)
    test(session)
