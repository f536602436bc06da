"""What a run has found out about its model and loss, so that it is not found out again at every measurement."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

HvpMethod: TypeAlias = Literal["auto", "exact", "gradients"]
PrecisionChoice: TypeAlias = Literal["auto", "training", "float32"]

OfStep: TypeAlias = Literal["unknown", "mean", "sum", "other"]

PARTS = 16


@dataclass
class Learned:
    """Facts about a model and its loss. They hold while the same weights are trained.

    Attributes:
        hvp: how Hessian-vector products are had; ``"auto"`` until that is settled.
        double_backward_verified: whether an exact product was held against differences of gradients.
        plain_kernels: whether exact products need attention's plain kernel, and compiled code run eagerly.
        symmetric: whether the curvature is symmetric, as far as is known.
        reach: the longest step of a difference of gradients that kinks of the loss leave certain, in the norm of the
            weights.
        rounded: whether the loss rounds its weights or activations.
        precision: in what precision is measured; ``"auto"`` until that is settled.
        splits: whether the loss of a batch is the mean over its parts; ``None``: not known yet.
        whole: why it is not, in words.
        fits: examples that memory has room for, where it once had none; ``None``: all of them.
        parts: that a batch is cut into for the running estimate.
        smooth: whether differences of gradients tell the curvature along a step that changes the gradient by a tenth;
            ``None``: not known yet.
        of_step: what ``.grad`` holds before an optimizer step: the gradient of the mean loss of the micro-batches, that
            of their sum, or another one; ``"unknown"``: not compared yet.
        micro_batches: of the step at which it was found to be a mean or a sum; where there are others, ``.grad`` may be
            divided by another number.
        uses: how often ``.grad`` was used since it was compared.
        whole_cheaper: whether the running estimate goes by one gradient of the whole step, not by products on parts;
            ``None``: not timed yet.
        solve_by_gradients: whether a solve takes less time by one gradient a product than by exact products; ``None``:
            not timed yet.
    """

    hvp: HvpMethod = "auto"
    double_backward_verified: bool = False
    plain_kernels: bool = False
    symmetric: bool = True
    reach: float = math.inf
    rounded: bool = False
    precision: PrecisionChoice = "auto"
    splits: bool | None = None
    whole: str = ""
    fits: int | None = None
    parts: int = PARTS
    smooth: bool | None = None
    of_step: OfStep = "unknown"
    micro_batches: int = 0
    uses: int = 0
    whole_cheaper: bool | None = None
    solve_by_gradients: bool | None = None

    def of_other_weights(self) -> Learned:
        """What still holds when other weights are trained: how the loss treats its batch."""
        return Learned(
            splits=self.splits,
            whole=self.whole,
            fits=self.fits,
            parts=self.parts,
            of_step=self.of_step,
            micro_batches=self.micro_batches,
            whole_cheaper=self.whole_cheaper,
            solve_by_gradients=self.solve_by_gradients,
        )

    def hvp_for(self, asked: HvpMethod) -> HvpMethod:
        """How products are had: as asked for, or as it is learned where that is left open."""
        return self.hvp if asked == "auto" else asked

    def precision_for(self, asked: PrecisionChoice) -> PrecisionChoice:
        """In what precision is measured: as asked for, or as it is learned where that is left open."""
        return self.precision if asked == "auto" else asked

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Learned:
        """The facts of :meth:`state_dict`.

        Raises:
            ValueError: a value is none of those that it may have.
        """
        fresh = asdict(cls())
        optional = {"splits": bool, "fits": int, "smooth": bool, "whole_cheaper": bool, "solve_by_gradients": bool}
        held: dict[str, Any] = {}
        for name, default in fresh.items():
            value = state.get(name, default)
            held[name] = None if value is None and name in optional else optional.get(name, type(default))(value)
        for name, kind in (("hvp", HvpMethod), ("precision", PrecisionChoice), ("of_step", OfStep)):
            choices = get_args(kind)
            if held[name] not in choices:
                raise ValueError(f"`{name}` is {held[name]!r}")
        if held["parts"] < 1 or (held["fits"] is not None and held["fits"] < 1):
            raise ValueError(f"{held['parts']} parts of which {held['fits']} examples fit into memory")
        return cls(**held)
