"""Sharpness, gradient flow and exact products beside what else there is, on four workloads, in one run."""
