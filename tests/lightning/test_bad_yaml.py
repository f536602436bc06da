"""Whatever is in a YAML file: the option by its name, never a traceback from inside, and nothing in it is run."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import yaml
from hypothesis import example, given, reject
from hypothesis import strategies as st
from jsonargparse import ArgumentError, ArgumentParser

import gfs_core as gfs
from gfs_report.worker import Refused, _is_nested
from lightning_gfs import GFSCallback
from tests.core.test_bad_input import DEEP, many

OPTIONS = sorted(f.name for f in dataclasses.fields(gfs.GFSConfig))
RUN = "!!python/object/apply:os.mkdir [{}]"
WORDS = st.sampled_from(
    [
        *(
            "gfs",
            "off",
            "null",
            "~",
            ".inf",
            "-.nan",
            "1e999",
            "0x10",
            "1_0",
            "*a",
            "&a [*a]",
            "{}",
            "[1, a]",
            "'",
            "%",
        ),
        *("? [1]\n      : 2", "2001-99-99", "!!binary x", '!!int ""', "!!timestamp x", "!!python/name:os", "9" * 5000),
    ]
)
VALUES = WORDS | st.floats().map(str) | st.integers().map(str) | st.text(max_size=6)


@cache
def parser() -> ArgumentParser:
    """As LightningCLI's, for callbacks."""
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--callbacks", type=list[L.Callback])
    return made


@many(300)
@given(st.sampled_from([*OPTIONS, "evry", "loss_fn"]), VALUES)
@example("tier", "off")
def test_any_value_in_yaml_is_taken_or_named(name: str, value: str) -> None:
    text = f"callbacks:\n- class_path: lightning_gfs.GFSCallback\n  init_args:\n    {name}: {value}\n"
    try:
        yaml.safe_load(text)
    except Exception:  # no YAML: never comes to the callback
        reject()
    if name == "evry" and value == "&a [*a]":  # jsonargparse itself follows it for ever
        reject()
    refused = ""
    try:
        callbacks = parser().instantiate(parser().parse_string(text)).callbacks
    except (ArgumentError, gfs.ConfigError) as error:
        refused = str(error)
    assert name in refused if refused else [type(c) for c in callbacks] == [GFSCallback]


def test_nothing_in_yaml_is_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    text = RUN.format(made)
    yaml.unsafe_load(text)
    assert made.exists()  # so it would be run, if it were
    made.rmdir()
    with pytest.raises(ArgumentError, match="could not determine a constructor"):
        parser().parse_string(f"callbacks:\n- class_path: lightning_gfs.GFSCallback\n  init_args:\n    history: {text}")
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {text}")
    with pytest.raises(Refused, match=r"config\.yaml is not YAML: could not determine a constructor"):
        _is_nested(config)
    assert not made.exists()


@many(300)
@given(text=st.binary(max_size=40) | VALUES.map(lambda v: f"model: {v}\n".encode()) | VALUES.map(str.encode))
@example(text=DEEP.encode())
@example(text=b"model: " + DEEP.encode())
@example(text=b"\xff\xfe")
@example(text=b"fit: 3")
@example(text=b"fit:\n  model: [1]")
def test_any_config_of_the_cli_is_read_or_refused(tmp_path: Path, text: bytes) -> None:
    config = tmp_path / "config.yaml"
    config.write_bytes(text)
    refused = ""
    try:
        nested = _is_nested(config)
    except Refused as error:
        refused = str(error)
    assert refused.startswith(str(config)) if refused else nested is False
