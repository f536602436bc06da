"""The documentation: it builds without a warning, its code runs, its messages and options are the program's own."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gfs_core
from gfs_core import GFSConfig
from gfs_core.actions import catalog as actions
from gfs_core.detectors import early_warning
from gfs_core.signals import catalog as signals
from gfs_core.signals.catalog import Signals

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("gfs_core", "lightning_gfs", "hf_gfs")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def blocks(*languages: str) -> list[Any]:
    """Every block of code in one of the languages, named by its page and line."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            if match[1] in languages:
                line = text.count("\n", 0, match.start()) + 2
                found.append(pytest.param(match[2], id=f"{page.name}:{line}"))
    return found


# --- the site -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not os.environ.get("CI"):
        pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


class Loaded(HTMLParser):
    """What a page loads, and its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        if tag in ("script", "img", "iframe", "link"):
            self.urls += [u for u in (held.get("src"), held.get("href")) if u]
        self.ids.add(held.get("id") or "")


def test_the_site_is_built_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert {p.stem for p in PAGES} - {"README"} <= {p.stem for p in pages}
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert not [u for u in loaded.urls if re.match(r"(\w+:)?//", u)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(\w+:)?//|@import", sheet.read_text()), sheet


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    loaded = Loaded()
    loaded.feed((site / "api.html").read_text())
    names = {f"gfs_core.{name}" for name in gfs_core.__all__}
    names |= {"lightning_gfs.GFSCallback", "hf_gfs.GFSCallback", "hf_gfs.GFSArguments"}
    names |= {"gfs_core.metrics.StabilityRatio", "gfs_core.StabilityMonitor.step"}
    assert names <= loaded.ids
    text = (site / "api.html").read_text()
    assert "{options}" not in re.sub(r"<details.*?</details>", "", text, flags=re.S)  # the source has them
    assert all(f"<td><code>{name}</code></td>" in text for name in [*GFSConfig.help(), *gfs_core.log_keys()])


def test_every_signal_is_in_the_table_with_its_keys(site: Path) -> None:
    text = (site / "tiers.html").read_text()
    for signal in Signals().all:
        keys = ", ".join(f"<code>{key.name}</code>" for key in signal.keys)
        row = f"<td><code>{signal.name}</code></td>\n<td>{keys}</td>\n<td>{signal.cost.name.lower()}</td>"
        assert row in text, signal.name


# --- the code -----------------------------------------------------------------------------------------------------


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the blocks take for granted, as small real objects; `trainer` is the Hugging Face one."""
    from lightning.pytorch import LightningModule, Trainer
    from tensorboard.compat.proto import event_pb2  # noqa: F401  (else torch's writer imports a stub)
    from torch.utils.tensorboard import SummaryWriter
    from torchmetrics import MetricCollection

    from lightning_gfs import GFSCallback

    for module, held in ((signals, "SIGNALS"), (early_warning, "DETECTORS"), (actions, "ACTIONS")):
        monkeypatch.setattr(module, held, list(getattr(module, held)))  # pages add to them
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    data = TensorDataset(torch.randn(160, 4), torch.randint(3, (160,)))
    loader = DataLoader(data, batch_size=8)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def loss_of_batch(batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    writer = SummaryWriter(str(tmp_path / "events"))
    yield {
        "gfs_core": gfs_core,
        "torch": torch,
        "nn": nn,
        "Trainer": Trainer,
        "GFSCallback": GFSCallback,
        "MetricCollection": MetricCollection,
        "model": model,
        "module": Module(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": loader,
        "validation_loader": loader,
        "general_loader": loader,
        "loss_of_batch": loss_of_batch,
        "loss": loss_of_batch(next(iter(loader))),
        "page_me": print,
        "writer": writer,
        "trainer": hugging_face_trainer(tmp_path),
    }
    writer.close()


def hugging_face_trainer(folder: Path) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(16, (8, 6))]
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    arguments = TrainingArguments(str(folder / "out"), max_steps=100, report_to=[], use_cpu=True, disable_tqdm=True)
    return Trainer(GPT2LMHeadModel(config), arguments, train_dataset=rows)


IN_ORDER = "how_it_works.md"  # whose blocks build on each other


@pytest.mark.filterwarnings("ignore")
def test_a_signal_a_detector_and_an_action_are_added_as_the_page_says(names: dict[str, Any]) -> None:
    for block in blocks("python"):
        if str(block.id).startswith(IN_ORDER):
            exec(compile(str(block.values[0]), str(block.id), "exec"), names)
    measurement = names["measurement"]
    assert sum(measurement.layers("trace").values()) == pytest.approx(measurement.trace)
    assert set(measurement.layers("trace")) == {name for name, _ in names["model"].named_parameters()}
    assert measurement.as_log_dict()["gfs/trace/0.weight"] == measurement.layers("trace")["0.weight"]
    assert Path("alerts.txt").read_text() == "29 ALARM the loss is nan\n"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", [b for b in blocks("python") if not str(b.id).startswith(IN_ORDER)])
def test_a_block_of_python_runs(code: str, names: dict[str, Any], request: pytest.FixtureRequest) -> None:
    exec(compile(code, request.node.callspec.id, "exec"), names)


@pytest.mark.filterwarnings("ignore")
def test_the_three_starts_measure(names: dict[str, Any], tmp_path: Path) -> None:
    starts = [b for b in blocks("python") if str(b.id).startswith("index.md")]
    for start in starts[:2] + starts[3:4]:
        exec(str(start.values[0]), dict(names))
    histories = sorted(str(p.relative_to(tmp_path).parts[0]) for p in tmp_path.rglob("history.jsonl"))
    assert histories == ["history.jsonl", "lightning_logs", "out"]
    for path in tmp_path.rglob("history.jsonl"):
        ratios = [m.step for m in gfs_core.read_history(path) if m.stability_ratio is not None]
        assert ratios
        assert ratios[0] <= 20


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_block_of_yaml_is_valid(text: str) -> None:
    from lightning_gfs import GFSCallback

    for callback in yaml.safe_load(text)["trainer"]["callbacks"]:
        assert callback["class_path"] == "lightning_gfs.GFSCallback"
        GFSCallback(**callback["init_args"])


def commands() -> list[list[str]]:
    lines = [line for b in blocks("sh", "") for line in str(b.values[0]).splitlines() if line.startswith("gfs ")]
    return [shlex.split(line.partition(" -- ")[0], comments=True) for line in lines]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_and_its_options_exist(words: list[str]) -> None:
    from typer.main import get_command

    from gfs_report.cli import app

    known: Any = get_command(app)
    command = known.commands[words[1]]
    options = {o for p in command.params for o in p.opts}
    assert {w for w in words[2:] if w.startswith("-")} <= options


# --- the words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_in_the_text_are_valid(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    known = GFSConfig.help()
    for name, value in re.findall(r"`(\w+)=(\"\w+\"|[\d.]+|None|True|False)`", text):
        if name in known:
            beside = {"tier": "gfs_full"} if name.endswith("_every") else {}
            GFSConfig(**{**beside, name: ast.literal_eval(value)})


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "benchmarks").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere_in_the_repository(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


def texts() -> str:
    """Every string in the packages, one a line; what is filled in is an ellipsis, backticks are left out."""
    found = []
    for path in (p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found).replace("`", "").replace('"', "'")


def test_messages_are_the_programs_own() -> None:
    rows = re.findall(r"^\| (`.*?) \| ", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    messages = [m for row in rows for m in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 60
    said = texts()
    filled_in = r"…|; |: |gfs_state\.pt|\b60\b"  # or put together
    parts = [(p.strip(" ;,.:()"), m) for m in messages for p in re.split(filled_in, m)]
    unknown = {m for p, m in parts if p.replace('"', "'") not in said}
    assert unknown == set()
