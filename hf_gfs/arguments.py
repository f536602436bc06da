"""The options as ``--gfs_…`` flags, for ``HfArgumentParser((TrainingArguments, GFSArguments))``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from gfs_core import GFSConfig

_PREFIX = "gfs_"


class _Options:
    def config(self) -> GFSConfig:
        """The options as a config.

        Raises:
            ConfigError: an option is out of its range.
        """
        return GFSConfig(**{f.name: getattr(self, _PREFIX + f.name) for f in fields(GFSConfig)})


if TYPE_CHECKING:

    @dataclass
    class GFSArguments(_Options):
        """Every option of :class:`~gfs_core.GFSConfig` under its name with ``gfs_`` in front."""

        def __init__(self, **options: Any) -> None: ...

else:
    _hints = get_type_hints(GFSConfig)
    GFSArguments = make_dataclass(
        "GFSArguments",
        [
            (_PREFIX + f.name, _hints[f.name], field(default=f.default, metadata={"help": f.metadata["help"]}))
            for f in fields(GFSConfig)
        ],
        bases=(_Options,),
    )
    GFSArguments.__module__ = __name__
    GFSArguments.__doc__ = """Every option of :class:`~gfs_core.GFSConfig` under its name with ``gfs_`` in front.

    Example:
        >>> from transformers import HfArgumentParser
        >>> [arguments] = HfArgumentParser(GFSArguments).parse_args_into_dataclasses(["--gfs_every", "50"])
        >>> arguments.config().every
        50
    """
