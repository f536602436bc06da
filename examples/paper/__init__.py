"""The claim of Kreisler et al. (ICML 2023) about gradient flow solutions, reproduced, with its limits.

``python -m examples.paper`` from the repository's root draws all figures from the stored results; ``--again`` computes
them anew. docs/paper.md has the figures, the settings and what was found.
"""
