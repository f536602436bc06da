"""What each tier tells of the exact stability ratio, what it costs, and whether the budget holds."""

from benchmarks.lib.data import text
from benchmarks.lib.models import Characters, cnn, mlp
from benchmarks.lib.trainings import adamw, sgd

__all__ = ["Characters", "adamw", "cnn", "mlp", "sgd", "text"]
