"""What the benchmarks share: data, networks, trainings, results, tables, plots and meters."""
