"""What the page says around its tables."""

HEAD = """# A run's own edge

    OMP_NUM_THREADS=1 python -m benchmarks.own_edge

The rate of a training is raised by the same factor in each step. Below some rate the stability ratio grows with the
rate, and mostly faster, as the curvature sharpens beside it. Above that rate, the *onset*, the training pushes the
curvature down as fast as the rate goes up, and the ratio stays at a *level*. Where do the two lie, what do theories
say of them, and what do they tell of the best rate? {combinations} combinations of a problem, an optimizer and a
batch size.

![Ratios over rates, levels over the speed of the ramp, and best rates over onsets](own_edge.svg)

## How it was measured

**Ramp.** ηᵢ = η₀·gⁱ, from a hundredth of the base rate on (a guess at a good rate), until the loss is lost (`is_lost`
of [gfs_core/search/ramp.py](../gfs_core/search/ramp.py): three quarters of what was gained are gone) or four decades
are done. g = 1.01, 1.03 and 1.1, seeds 0 and 1 (weights, and the order of the batches); on nine combinations also
1.003. From 0.1 and 0.001 of the base rate as well, with g = 1.03. Epochs without repetition, what is left over at
their end dropped.

**Running ratio.** `StabilityMonitor` with `tier="running", every=2, max_overhead=None`: (preconditioned) sharpness
over the optimizer's threshold, 2/η for SGD and RMSprop, 2(1 + β)/η for momentum, 2(1 + β₁)/((1 − β₁)η) for Adam and
AdamW; β = β₁ = 0.9, the other settings torch's. It averages its last ten measurements or so, twenty steps: where the
curvature falls by 1 % in a step that is 10 to 20 % too high, and far more at 10 %.

**Knee.** `Ramp.of`: two lines with least squares through the logarithms of ratio and rate, of all ratios after the
last one that is 30 times below the largest; the first slope at least 0.8, the second at most half of that, and the
squared error at most 0.8 of that of a single line. *Onset*: the rate at the knee. *Level, running*: median of the
ratios from there to half the rate at which the loss was lost.

**Solved.** The same ramp once more with the same seed, hence the same training, at three rates between a quarter of
the onset and the onset, and at six between it and half the rate that was lost: the ratio with the largest eigenvalue
solved for (Lanczos, tolerance 1e-2, a cold start) on a sample of the training data (all 1437 of digits for the
networks without convolutions and 2000 entries of the matrix; else 512 images, 128 rows of the GRU and 64 of the
transformer), and *batch sharpness*: the mean over 8 batches, drawn anew, of gᵀP⁻¹HP⁻¹g / gᵀP⁻¹g, with g and H of one
batch in its training size, P = 1 for SGD (Andreyev & Beneventano, [2412.20553](https://arxiv.org/abs/2412.20553)) and
the optimizer's preconditioner else. BatchNorm is in training mode. *Level, solved*: the median over the six points of
both seeds.

**Best rate.** Validation loss after 400 steps with 5 % of warm-up and a cosine, at rates half a decade apart, upwards
and downwards from the base rate until the best has a worse one on either side; so it is known to a quarter of a
decade.

**Problems.** Digits (1437 to train on): ReLU MLP 64-100-100-10, a CNN of two convolutions, one with BatchNorm, six
tanh layers of 40. Fashion-MNIST (4000): a CNN. Python's manual by characters: a GRU of 48 (rows of 12), a transformer
of two blocks of width 32 (rows of 24). A matrix of 200 × 150 of rank 4 with noise, a quarter of its entries given, as
a product of two embeddings of 8. Cross-entropy, or half the squared distance. All of them are small, and most can be
fitted: [combinations.py](own_edge/combinations.py).

## Level and onset

In the columns with two values: seeds 0 and 1. *Running / solved*: median over the same points; what is not near 1 is
the error of the running estimate.
"""
LEVELS = """## Which theory tells the level
"""
THEORY = """*In brief*: medians, and in how many combinations within 0.75 to 1.25.
"""
SPEED = """## Over the speed of the ramp
"""
HELD = """## At a constant rate
"""
REPEATABLE = """## How repeatable it is
"""
FIT = """## How often a knee is found, and by which fit
"""
RATES = """## The best rate over the onset
"""
WARMUP = """## In the warm-up of an ordinary schedule
"""
