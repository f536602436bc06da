"""The signals: the quantities that are measured, one family per file."""
