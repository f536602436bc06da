"""Compiled models: whether a measurement may run the compiled code, or runs the model eagerly.

A measurement runs everything eagerly (:class:`~gfs_core.loss.snapshot.StateSnapshot`): a probe of another shape would
have the code compiled anew, and a captured CUDA graph must stay as training left it. One gradient of a whole
micro-batch has the shapes of training, so the compiled code can be used.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from torch import nn


def as_compiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A context in which compiled code runs compiled, where that is safe; for inputs of the shapes of training."""
    if "torch._dynamo" not in sys.modules or not _is_safe(model):
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("default")
    return stance


def _is_safe(model: nn.Module) -> bool:
    """Whether no CUDA graph was captured: on a CPU, or where the compiled modules show that they have none."""
    if all(p.device.type == "cpu" for p in model.parameters()):
        return True
    compiled = [m for m in model.modules() if hasattr(m, "dynamo_ctx")]
    hidden = any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
    return bool(compiled) and not hidden and not any(map(_captures, compiled))


def _captures(module: Any) -> bool:
    options = getattr(module.dynamo_ctx, "compiler_config", None)
    return options is None or bool(options.get("triton.cudagraphs", True))
