"""What TensorBoard's own plugin draws of a folder, and what an offline run of W&B defines and draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin
from wandb.proto.wandb_internal_pb2 import Record

from tests.wandb_files import _records, logged

LAYOUT_TAG = b"custom_scalars__config__"


def drawn(folder: Path) -> dict[str, dict[str, set[str]]]:
    """The tags that are drawn in each chart of each category, of the one run below ``folder``."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    [run] = multiplexer.Runs()
    plugins: dict[str, Any] = {}
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = TBContext(logdir=str(folder), data_provider=provider, plugin_name_to_instance=plugins)
    plugins["scalars"] = ScalarsPlugin(context)
    plugin = CustomScalarsPlugin(context)
    found = plugin.layout_impl(RequestContext(), "")  # JSON, or an empty dictionary where there is none
    charts: dict[str, dict[str, set[str]]] = {}
    for category in json.loads(found)["category"] if found else []:
        for chart in category["chart"]:
            expression = "|".join(f"({tag})" for tag in chart["multiline"]["tag"])  # as the page asks for them
            answer = plugin.scalars_impl(RequestContext(), run, expression, "")
            assert answer["regex_valid"]
            charts.setdefault(category["title"], {})[chart["title"]] = set(answer["tag_to_events"])
    return charts


def layouts(folder: Path) -> int:
    """How many layouts stand in the event files below ``folder``."""
    return sum(path.read_bytes().count(LAYOUT_TAG) for path in folder.rglob("*tfevents*"))


class OfflineRun:
    """The one finished offline run of W&B below ``folder``.

    Attributes:
        rows: what was logged.
        metrics: the definitions of metrics, the latest of each name, as ``name: step metric``.
        charts: the configuration of each custom chart.
        tables: its data, as ``{line: [(x, y), …]}``.
    """

    def __init__(self, folder: Path) -> None:
        self.rows = logged(folder)  # waits for its end
        [path] = folder.rglob("*.wandb")
        self.metrics: dict[str, str] = {}
        self.charts: dict[str, Any] = {}
        self.tables: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for record in map(Record.FromString, _records(path.read_bytes())):
            kind = record.WhichOneof("record_type")
            if kind == "metric":
                self.metrics[record.metric.glob_name or record.metric.name] = record.metric.step_metric
            elif kind == "config":
                for item in record.config.update:
                    if list(item.nested_key)[:2] == ["_wandb", "visualize"]:
                        self.charts[item.nested_key[2]] = json.loads(item.value_json)["panel_config"]
        for name, chart in self.charts.items():
            key = chart["userQuery"]["queryFields"][0]["fields"][-1]["args"][0]["value"]
            where = [row[f"{key}.path"] for row in self.rows if f"{key}.path" in row][-1]
            lines: dict[str, list[tuple[int, float]]] = {}
            table = json.loads((path.parent / "files" / where).read_text())
            assert table["columns"] == ["step", "lineKey", "lineVal"] == list(chart["fieldSettings"].values())
            for step, line, value in table["data"]:
                lines.setdefault(line, []).append((step, value))
            self.tables[name] = lines
