"""The data sets, under their former name until all benchmarks take them from `benchmarks.lib.data`."""

from benchmarks.lib.data import digits, fashion_mnist

__all__ = ["digits", "fashion_mnist"]
