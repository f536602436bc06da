"""The supported versions and the packages that are built, each in an environment of its own: one command, `nox`.

    pipx run --spec 'nox[uv]' nox   # all of it: gigabytes to install, about half an hour on two cores
    nox -s package                  # what is built, installed alone
    nox -s oldest -- tests/hf       # some of the tests
    nox -s trainers                 # docs/trainers.md: with packages that have trainers of their own

`oldest` takes the lower bounds of pyproject.toml, `newest` what the package index has. The table in the README is what
they were run with. With CI, which has 3.11, every supported Python has its turn.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"

TESTS = (  # all but the examples, the documentation, the paper, several processes, and trainers of other packages
    "tests/core",
    "tests/lightning",
    "tests/hf",
    "tests/report",
    "tests/test_public_api.py",
    "gfs_core",
    "--ignore=tests/hf/test_clients.py",
    "--ignore=tests/report/test_browser.py",
)
TOOLS = (
    "pytest",
    "hypothesis",
    "pytest-xdist",
    "jsonargparse[signatures]>=4.39",
    "wandb",
    "trackio",
    "schedulefree",
    "playwright",
    "axe-playwright-python",
)
PACKAGES = ("chemprop", "darts", "neuralforecast", "pytorch-forecasting", "setfit", "torch-geometric")
OPTIMIZERS = ("apollo-torch", "bitsandbytes", "galore-torch", "lomo-optim", "torch-optimi")
COMPANIONS = (  # required without a bound, these would come as the newest: the first would take typer along
    "typer-slim>=0.16",
    "pytorch-lightning>=2.5.2",
)
BOUNDS = """
from importlib.metadata import requires, version
from packaging.requirements import Requirement
from packaging.version import Version
for need in map(Requirement, requires("gfs-sharpness")):
    if need.marker is None or need.marker.evaluate({"extra": "all"}):
        (bound,) = need.specifier
        assert Version(version(need.name)) == Version(bound.version), f"{need} is tested with {version(need.name)}"
"""
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
trainer.add_callback(GFSCallback(every=2, max_overhead=None, history="history.jsonl"))
trainer.train()
import gfs_core
assert any(m.stability_ratio for m in gfs_core.read_history("history.jsonl"))
"""
REPORT = """
import gfs_core, torch
from typer.testing import CliRunner
from gfs_report.cli import app

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
monitor = gfs_core.StabilityMonitor(model, optimizer, gfs_core.GFSConfig(every=2, history="history.jsonl"))
for _ in range(6):
    batch = torch.randn(8, 4)
    loss = model(batch).square().mean()
    optimizer.zero_grad()
    loss.backward()
    monitor.step(lambda batch: model(batch).square().mean(), batch, loss=loss)
    optimizer.step()
for arguments in (["--help"], ["report", "--help"], ["report", "history.jsonl", "-o", "page.html"]):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
assert "history.jsonl" in open("page.html").read()
"""


@nox.session(python="3.12")
def package(session: nox.Session) -> None:
    """Wheel and sdist: built, checked, and each installed alone, with torch only and with one extra only."""
    shutil.rmtree("dist", ignore_errors=True)
    session.install("build", "twine", "hatchling", "pytest")
    session.run("pytest", "tests/test_package.py")  # what is inside, and that the sdist builds the same wheel
    session.run("python", "-m", "build", "--outdir", "dist", silent=True)
    wheel, sdist = sorted(Path("dist").resolve().iterdir(), key=lambda path: path.suffix, reverse=True)
    session.run("twine", "check", "--strict", str(wheel), str(sdist))
    folder = session.create_tmp()
    home = Path(folder).resolve() / "alone"
    python = str(home / "bin" / "python")
    torch = session.posargs or ["torch"]  # `nox -s package -- torch==2.13.0`
    lightning, hf = ("lightning_gfs", "Lightning", "lightning"), ("hf_gfs", "transformers", "hf")
    for what, extra, works, missing in (
        (wheel, "", SHARPNESS, (lightning, hf)),
        (sdist, "", SHARPNESS, (lightning, hf)),
        (wheel, "[lightning]", LIGHTNING, (hf,)),
        (wheel, "[hf]", HUGGING_FACE, (lightning,)),
        (wheel, "[report]", REPORT, (lightning, hf)),
    ):
        session.run("uv", "venv", "--quiet", "--clear", "--python", str(Path(session.bin) / "python"), str(home))
        session.run("uv", "pip", "install", "--quiet", "--python", python, *torch, f"{what}{extra}")
        with session.chdir(folder):
            Path("history.jsonl").unlink(missing_ok=True)
            session.run(python, "-W", "ignore", "-c", works, external=True)
            for name, framework, its in missing:
                session.run(python, "-c", REFUSED.format(package=name, name=framework, extra=its), external=True)
        session.log(f"{what.name}{extra}, installed alone: works")


def test(session: nox.Session) -> None:
    """Say what there is, and run the tests."""
    session.run("python", "-W", "ignore", "-c", VERSIONS)
    options = ("-n", "2", "--dist", "loadfile")
    session.run("pytest", *(session.posargs or (*options, *TESTS)), env={"OMP_NUM_THREADS": "1"})


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """The lower bounds, each to the letter: `--upgrade` lets uv go back from what an earlier run has left."""
    session.install("--upgrade", "--resolution", "lowest-direct", "-e", ".[all]", *COMPANIONS)
    session.install(*TOOLS)
    session.run("python", "-c", BOUNDS)
    test(session)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """What the package index has."""
    session.install("--upgrade", "-e", ".[all]", *TOOLS)
    test(session)


@nox.session(python="3.11")
def trainers(session: nox.Session) -> None:
    """Packages with trainers and modules of their own: their trainings, and the page that says what happened."""
    session.install("-c", "constraints.txt", "-e", ".[dev]", *PACKAGES)
    session.install("--no-deps", *OPTIMIZERS)  # some ask for packages that they do not import
    if not session.posargs:
        session.run("python", "-m", "tests.trainers.table", env={"OMP_NUM_THREADS": "1"})
    session.run("pytest", "tests/trainers", *session.posargs, env={"OMP_NUM_THREADS": "1"})
