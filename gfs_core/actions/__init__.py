"""Actions on alerts, and the control of the learning rate."""
