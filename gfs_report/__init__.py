"""The command line and the pages that people look at."""

import sys


def main() -> None:
    """Entry point of the `gfs` command."""
    try:
        from gfs_report.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("gfs_core", "gfs_report"):
            raise
        sys.exit(f"gfs needs {error.name}: pip install 'gfs-sharpness[demo]'")
    app()
