"""The loss as a function of the weights in place, and its derivatives."""
