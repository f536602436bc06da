"""Everything whose state lasts for a whole training run."""
