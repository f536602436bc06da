"""Largest eigenvalues: accuracy against dense Hessians, and what a warm measurement costs beside other libraries."""
