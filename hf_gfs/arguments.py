"""The options as ``--gfs_…`` flags, for ``HfArgumentParser((TrainingArguments, GFSArguments))``."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from gfs_core import GFSConfig
from gfs_core.config import is_off, may_be_off

_PREFIX = "gfs_"


class _Options:
    def config(self) -> GFSConfig:
        """The options as a config.

        Raises:
            ConfigError: an option is out of its range.
        """
        return GFSConfig(**{f.name: getattr(self, _PREFIX + f.name) for f in fields(GFSConfig)})


def _flag_type(hint: Any) -> Any:
    """The function or type that ``HfArgumentParser`` reads a flag with.

    From ``T | None`` the parser would take ``T`` alone, so that no text could turn the option off.
    """
    return _reader(get_args(hint)[0]) if may_be_off(hint) else hint


def _reader(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if is_off(text):
            return None
        try:
            return kind(text)
        except ValueError:
            raise ArgumentTypeError(f"must be {kind.__name__}, or none, null or off; got {text!r}") from None

    return read


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
            (
                _PREFIX + f.name,
                _flag_type(_hints[f.name]),
                field(default=f.default, metadata={"help": f.metadata["help"]}),
            )
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
