"""What is tried out before a training, so that its learning rate can be chosen."""
