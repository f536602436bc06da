"""What knows ``torch.optim``: thresholds, preconditioners, the rate of a step."""
