"""What measuring costs as models, probes and numbers of processes grow, and a model of that cost."""
