"""The command line and the pages that people look at."""
