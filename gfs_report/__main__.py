"""``python -m gfs_report``, the same as ``gfs``."""

from gfs_report import main

main()
