"""Every option that may be ``None`` is turned off by a word, wherever options can be written."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any, get_type_hints

import lightning as L
import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from transformers import HfArgumentParser

import gfs_core as gfs
import hf_gfs
from gfs_core.config import GONE, may_be_off
from hf_gfs import GFSArguments
from lightning_gfs import GFSCallback

HINTS = get_type_hints(gfs.GFSConfig)
OPTIONAL = [f.name for f in dataclasses.fields(gfs.GFSConfig) if may_be_off(HINTS[f.name])]
WORDS = ["none", "None", "NULL", "null", "off", "OFF"]


def test_the_options_that_may_be_off() -> None:
    assert {"max_overhead", "running_every", "probe_size", "max_memory", "margin", "history"} == set(OPTIONAL)
    assert "every" not in OPTIONAL


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("value", [None, False, *WORDS])
def test_a_keyword(name: str, value: Any) -> None:
    assert getattr(gfs.GFSConfig.from_options(**{name: value}), name) is None
    assert getattr(GFSCallback(**{name: value}).config, name) is None


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("word", WORDS)
def test_a_flag_of_the_trainer(name: str, word: str) -> None:
    [arguments] = HfArgumentParser(GFSArguments).parse_args_into_dataclasses([f"--gfs_{name}", word])
    assert getattr(arguments.config(), name) is None


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("text", ["null", "off", "none", '"off"', "None"])
def test_a_file_of_the_trainer(tmp_path: Path, name: str, text: str) -> None:
    parser = HfArgumentParser(GFSArguments)
    path = tmp_path / "run.yaml"
    path.write_text(f"gfs_{name}: {text}")
    [arguments] = parser.parse_yaml_file(path)
    assert getattr(arguments.config(), name) is None
    word = None if text == "null" else text.strip('"')
    path.write_text(json.dumps({f"gfs_{name}": word}))
    [arguments] = parser.parse_json_file(path)
    assert getattr(arguments.config(), name) is None


def config_of_the_cli(monkeypatch: pytest.MonkeyPatch, *args: str) -> gfs.GFSConfig:
    monkeypatch.setattr(sys, "argv", ["run"])
    given = ["--trainer.accelerator=cpu", "--trainer.logger=false", *args]
    cli = LightningCLI(BoringModel, args=given, run=False, seed_everything_default=0, save_config_callback=None)
    [callback] = [c for c in cli.trainer.callbacks if isinstance(c, GFSCallback)]
    return callback.config


@pytest.mark.parametrize("word", ["none", "OFF", "null"])
def test_flags_of_the_command_line(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    flags = [f"--trainer.callbacks.{name}={word}" for name in OPTIONAL]
    config = config_of_the_cli(monkeypatch, "--trainer.callbacks+=lightning_gfs.GFSCallback", *flags)
    assert {name: getattr(config, name) for name in OPTIONAL} == dict.fromkeys(OPTIONAL)


@pytest.mark.parametrize("text", ["null", "off", "none", "None", '"off"'])
def test_a_file_of_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    head = "trainer:\n  callbacks:\n    - class_path: lightning_gfs.GFSCallback\n      init_args:\n"
    path.write_text(head + "".join(f"        {name}: {text}\n" for name in OPTIONAL))
    config = config_of_the_cli(monkeypatch, f"--config={path}")
    assert {name: getattr(config, name) for name in OPTIONAL} == dict.fromkeys(OPTIONAL)


NUMBERS = [name for name in OPTIONAL if name != "history"]  # every other word is a path


@pytest.mark.parametrize("name", NUMBERS)
def test_any_other_word_is_an_error_with_name_value_and_what_is_valid(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    kind = "float" if float in HINTS[name].__args__ else "int"
    with pytest.raises(gfs.ConfigError, match=f"`{name}` must be {kind} or None, got 'nil'"):
        gfs.GFSConfig.from_options(**{name: "nil"})
    with pytest.raises(gfs.ConfigError, match=f"`{name}` must be {kind} or None, got True"):
        gfs.GFSConfig.from_options(**{name: True})
    with pytest.raises(SystemExit) as stop:
        HfArgumentParser(GFSArguments).parse_args_into_dataclasses([f"--gfs_{name}", "nil"])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert re.search(rf"argument --gfs_{name}.*: must be {kind}, or none, null or off; got 'nil'", told)
    with pytest.raises(SystemExit) as stop:
        config_of_the_cli(
            monkeypatch, "--trainer.callbacks+=lightning_gfs.GFSCallback", f"--trainer.callbacks.{name}=nil"
        )
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert name in told
    assert "nil" in told
    assert "null" in told


def test_an_option_that_cannot_be_off_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(gfs.ConfigError, match="`every` must be int, got 'none'"):
        gfs.GFSConfig(every="none")  # type: ignore[arg-type]
    with pytest.raises(gfs.ConfigError, match="`every` must be int, got False"):
        gfs.GFSConfig(every=False)


@pytest.mark.parametrize("name", GONE)
@pytest.mark.parametrize("callback", [GFSCallback, hf_gfs.GFSCallback])
def test_a_callback_tells_of_an_option_that_is_no_more_what_to_use(callback: type, name: str) -> None:
    with pytest.raises(gfs.ConfigError, match=f"^there is no option `{name}` any more: {re.escape(GONE[name])}$"):
        callback(**{name: 3})


def test_the_callback_with_an_option_off_trains() -> None:
    callback = GFSCallback(max_overhead="off", every=1, tier="running")
    trainer = L.Trainer(
        max_steps=10,  # the running estimate has settled after 8
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    trainer.fit(BoringModel())
    assert "gfs/running_stability_ratio" in trainer.callback_metrics
