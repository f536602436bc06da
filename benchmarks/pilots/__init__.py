"""Ways to choose a learning rate by short runs, compared."""
