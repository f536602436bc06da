"""What a one-gradient estimate needs beside the step itself, where logits are most of what the step holds."""

from __future__ import annotations

from benchmarks import memory


def test_a_running_measurement_fits_where_the_step_fits_and_three_copies_of_the_weights() -> None:
    row = next(memory.logits())  # of one gradient a product, with a vocabulary of 50,000
    assert row["signal"] == "running, one gradient"
    assert row["reasons"] == []
    for peak in (row["first"], row["warm"]):
        assert 0 < (peak - row["step"]) / row["copy"] < 3.1
