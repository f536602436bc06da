"""What the page says around its tables."""

HEAD = """# A run's own edge

    OMP_NUM_THREADS=1 python -m benchmarks.own_edge

The rate of a training is raised by the same factor in each step. Below some rate the stability ratio grows with the
rate, and mostly faster, as the curvature sharpens beside it. Above that rate, the *onset*, the training pushes the
curvature down as fast as the rate goes up, and the ratio stays at a *level*. Where do the two lie, what do theories
say of them, and what do they tell of the best rate? {combinations} combinations of a problem, an optimizer and a
batch size.

![Ratios over rates, levels over the speed of the ramp, and best rates over onsets](own_edge.svg)

## In brief
"""
HOW = """## How it was measured

**Ramp.** ηᵢ = η₀·gⁱ, from a hundredth of the base rate on (a guess at a good rate), until the loss is lost (`is_lost`
of [gfs_core/search/ramp.py](../gfs_core/search/ramp.py): three quarters of what was gained are gone) or four decades
are done. g = 1.01 and 1.03 with seeds 0 and 1 (weights, and the order of the batches), 1.1 with seed 0. Eleven
combinations, those under *Over the speed*, also have g = 1.1 with seed 1, g = 1.003, and g = 1.03 from 0.1 and 0.001
of the base rate. Epochs without repetition, what is left over at their end dropped.

**Running ratio.** `StabilityMonitor` with `tier="running", every=2, max_overhead=None`: (preconditioned) sharpness
over the optimizer's threshold, 2/η for SGD and RMSprop, 2(1 + β)/η for momentum, 2(1 + β₁)/((1 − β₁)η) for Adam and
AdamW; β = β₁ = 0.9, the other settings torch's. It averages its last ten measurements or so, twenty steps. It goes by
whole batches here: by default one timing decides whether it goes by parts of them, and one of 32 ramps that were made
twice on a busy machine had another estimate, another onset (by a factor of two) and the same training.

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
LEVELS = """\
*Theorems*, both of quadratics only: with full batches, steps are stable below 2/η (SGD) or 2(1 + β)/η (heavy ball,
and Adam with its second moments held, 2(1 + β)/((1 − β)η)); with independent batches and one direction, λ + f·σ²/λ
has to be below that, f = (1 + β)/(1 − β) ([derived here](../docs/control.md), a known condition for β = 0). *Measured
by others*: the sharpness settles at these thresholds with full batches (Cohen et al.
[2021](https://arxiv.org/abs/2103.00065), [2022](https://arxiv.org/abs/2207.14484)), batch sharpness at 2/η with small
ones (Andreyev & Beneventano), and with momentum at 2(1 − β)/η for small and at 2(1 + β)/η for large ones (Andreyev et
al. [2604.14108](https://arxiv.org/abs/2604.14108)), all at constant rates. *Not known*: what holds while the rate
rises, and for Adam with small batches.

## Which theory tells the level

Each column is what that theory says to be 1: the solved sharpness, or batch sharpness, over its threshold. For Adam
they are of the preconditioned Hessian, and (1 − β)η stands for η: so 2/η and 2(1 − β)/η, which is then 2/η as well,
are one. For SGD and RMSprop there is one threshold. All points behind the onset, up to half the rate that was lost,
both seeds.
"""
THEORY = """*In brief*: medians, and in how many combinations within 0.75 to 1.25.
"""
AFTER = """\
**SGD and RMSprop: 2/η**, to a factor of about 1.5 in all combinations, and to 25 % in two of seven. What is off has a
direction: above 1 with full batches and with squared loss, below it with cross-entropy and batches of 16 and 64.
Batch sharpness is not nearer than λ. The ratio in the mean square is nearest with batches of 64 (1.0 to 1.2 with
SGD).

**Momentum, batches of 64 and less**: 2(1 + β)/η never; 2(1 − β)/η at the beginning of the level, and batch sharpness
there within 25 % in half of the combinations. As the rate goes on, λη and batch sharpness rise, to 1.5 times that in
the median of all points and up to 8 times, and none of the thresholds is kept. Two kinds are exceptions: the deep
tanh network with squared loss, whose level lies midway between the two thresholds, and the matrix, whose loss is lost
at a ratio of 0.006. An embedding is trained only where its rows are in the batch; neither threshold is meant for
that, and the running estimate is six to seven times too low there.

**Momentum, large batches**: 2(1 + β)/η, which [holds with squared loss at a constant rate](edge.md), is not reached:
the slope before the knee is about 1, so the curvature had not changed until then. Probably these networks have fitted
their data behind it, which lets the sharpness of cross-entropy fall (Cohen et al. 2021); then such a knee is the end
of learning and no edge. That was not looked into.

**Adam and AdamW** are like momentum, in the units of the preconditioned Hessian: at small batches λη begins at 2 in
the median (within 25 % in one of five) and rises from there. No threshold of theirs for small batches is known to us;
this is the one that momentum's suggests.
"""
SPEED = """## Over the speed of the ramp

Level, solved for, and level of the running ratio; seed 0. The dependence is no artefact of the running estimate and
its memory: what is solved for depends on the speed as much. What would explain it, and is not proved: the curvature
has to fall by 1 % in each step at 1 %, and what makes it fall, swings along the sharpest direction (Damian et al.
[2023](https://arxiv.org/abs/2209.15594)), grows with the excess over the threshold. Then the level of a slow ramp
would be the threshold, and 1 % a step is not slow enough, as most levels are lower still at 0.3 %. But a slower ramp
trains longer too, and cross-entropy falls in sharpness as data are fitted.
"""
HELD = """## At a constant rate

After a ramp at 3 % the rate stays at twice the onset (of the slow ramp, seed 0) for 300 steps: medians of the running
ratio, and medians of five points in the last 100 steps. In the first hundred steps it is the level of the ramp to
within 40 %. In the last hundred it is 0.15 to 0.73 of that; only with squared loss and SGD it stays at 1. So a level
that is learnt early is an upper bound later on. In some combinations twice the onset is too much, and the run is
lost.
"""
REPEATABLE = """## How repeatable it is

Quotients of onsets and of levels where both ramps have a knee. *Off by*: median of the factor, whichever way. Where a
ramp begins matters little; how fast it is matters most.
"""
FIT = """## How often a knee is found, and by which fit

Other fits of the same ratios ([fits.py](own_edge/fits.py)). *Window by running medians*: what is looked at begins
after the last median of five that is 30 times below the largest median, so that one ratio which shoots up with the
loss decides nothing. *Room*: fitted up to 0.7 of the rate that was lost, and a knee above half of that does not
count. They were thought of while the first eight combinations were there (*chosen on*), the *others* came after.

On the first ones the onset where 0.7 of the level is reached was four times more repeatable than the knee; on the
others it was not. What held on both: with room there are fewer false knees (2 in place of 5 of 10), and as many true
ones; one pair of seeds came out far apart by it. The knees that are missed are those of fast ramps, in which there
are not six ratios on either side, or of ramps that are lost soon after the onset. With a constant curvature (linear
regression) the ratio passes 1, the loss grows, and the first steps of that look like a knee.
"""
RATES = """## The best rate over the onset

Seeds are counted apart. *Spread*: standard deviation in decades; the grid alone gives 0.14. With large batches the
best rate is mostly below the onset, and with BatchNorm far above it. Over all, the onset tells the best rate better
than nothing does; within one optimizer it tells no more than the optimizer's name (last column). The rate at which
the loss was lost tells more, and the geometric mean of the two most. That was noticed after 24 combinations; those
that came after are listed apart, and are few. In the faster ramps of [find_rate](rate.md) (50 searches) the best rate
is 0.24 times that mean, with a spread of 0.32 decades, no better than 0.33 for where its first pilot begins: onsets
are late there.
"""
WARMUP = """## In the warm-up of an ordinary schedule

Linear warm-ups to the best rate of the reference, of 50, 100 and 200 steps (5 to 10 % of 500 to 4000), seed 0, with
the ratio at every second or tenth step, without a budget, or with every default (tier `gfs`, 5 % of the wall time, by
the clock of a busy machine, so that a few more are possible). The same fit, on the warm-up alone. Factors with their
spread. *Rate < 2 × onset*: no knee is to be expected, and one that is found is false.

A knee needs twelve ratios, six of them in the first part. A linear warm-up spends nine tenths of its steps in the
last decade of the rate, so they are there from 100 steps on at every second step; that the onset comes out two to
three times too high is the speed of the warm-up. With the defaults there are 7 to 14 ratios, and no knee. But the
median of the last quarter's ratios is about the level of the slow ramp: 1.5 times it after 100 steps and 1.0 times
after 200, where there are any in that quarter (the defaults left some to 4 of 19 there). So a run can learn its own
level from its own warm-up, as a median and not as a knee, provided that the rate is above the onset; whether it is,
the warm-up does not tell with the defaults.
"""
ALARMS = """## What it is worth to the early warning

    OMP_NUM_THREADS=1 python -m benchmarks.zoo.own_edge

The trainings of [health.md](health.md) and three seeds of each danger of [danger.md](danger.md), with the ratio at
every tenth step. A level is learnt while the rate rises, from twelve ratios over a factor of four on. A swing at the
edge is then one at 0.7 to 1.6 times the level in place of these ratios themselves, and thresholds of gradients are
multiplied by 0.7 where the ratio is above 1.6 times the level, and by 1.5 where it is below half of it. These numbers
were set beforehand. *Warned*: share of the breaks, the mean over the kinds. A level is learnt in few of the trainings,
and what it changes is no gain. So the early warning has no level of the run's own: it holds what the run came through
before.
"""
