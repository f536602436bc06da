"""What knows nothing of training: vectors, operators, eigenvalues, an integrator."""
