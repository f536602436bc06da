"""Everything that knows ``torch.optim``: thresholds, preconditioners, learning rates."""
