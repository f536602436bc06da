"""What lasts over a training run."""
