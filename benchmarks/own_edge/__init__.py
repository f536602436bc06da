"""Where the rising rate of a training stops raising its stability ratio: level and onset, beside theories of them."""
