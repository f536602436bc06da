"""What is added to the trainer of a user's job: measuring, a factor on the rate, an end; and nothing is saved.

``Trainer.fit`` of Lightning and ``Trainer.train`` of transformers are wrapped, as profilers do. The job is left as soon
as it has taken its steps; nothing that comes after its training runs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import warnings
from pathlib import Path
from typing import Any

from gfs_core import ConfigError
from gfs_core.loss.batches import batch_size
from gfs_report.jobs import Plan
from gfs_report.recording import Watched

_VALIDATED = 2  # batches of a validation: enough for the schedulers that go by it


def lightning(module: Any, plan: Plan, folder: Path) -> None:
    """Change the Trainer in ``module``, which has just been imported."""
    root = module.__name__.removesuffix(".trainer.trainer")
    fit = module.Trainer.fit

    @functools.wraps(fit)
    def watched(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        trainer.loggers = [_silent_logger(root, folder)]
        if any(getattr(c, "_early_exit", False) for c in trainer.callbacks):  # Tuner's trials, before the training
            return fit(trainer, *args, **kwargs)
        if trainer.world_size > 1:
            raise ConfigError(f"the job runs in one process here, and asks for {trainer.world_size}: give it devices=1")
        job = Watched(plan, folder)
        given = inspect.signature(fit).bind(trainer, *args, **kwargs)
        given.arguments["ckpt_path"] = None
        trainer.num_sanity_val_steps = 0
        limit = trainer.limit_val_batches
        trainer.limit_val_batches = min(limit, _VALIDATED) if isinstance(limit, int) else _VALIDATED if limit else 0
        trainer.callbacks = [*trainer.callbacks, _lightning_watch(root, job)]
        fit(*given.args, **given.kwargs)
        job.leave()

    module.Trainer.fit = watched


def _silent_logger(root: str, folder: Path) -> Any:
    """A logger that takes everything and writes nothing."""
    dummy = importlib.import_module(f"{root}.loggers.logger").DummyLogger
    return type("Silent", (dummy,), {"save_dir": property(lambda self: str(folder))})()


def _lightning_watch(root: str, job: Watched) -> Any:
    flavour = importlib.import_module(root)
    unwanted = (
        importlib.import_module(f"{root}.callbacks").Checkpoint,
        importlib.import_module(f"{root}.callbacks").EarlyStopping,
        importlib.import_module(f"{root}.callbacks").ProgressBar,
    )
    from lightning_gfs import GFSCallback, _compat

    class Watch(flavour.Callback):  # type: ignore[name-defined,misc]
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            own = next((c for c in trainer.callbacks if isinstance(c, GFSCallback)), None)
            trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, (*unwanted, GFSCallback))]
            self.gfs = GFSCallback(loss_fn=None if own is None else own.loss_fn, **job.options(own))
            self.begun = self.steps = 0
            if job.plan.begin == 0:
                trainer.callbacks.insert(0, self.gfs)  # before this one, whose hooks find it ready

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            if len(trainer.optimizers) > 1:
                raise ConfigError(
                    f"this job has {len(trainer.optimizers)} optimizers, and one can be looked at here; add "
                    "GFSCallback to it, with a `loss_fn` for each, and read what it logs with `gfs report`"
                )

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            _lightning_schedule(trainer, job)
            _compat.keep_share(trainer, job.plan.share)
            if job.plan.begin == 0:
                job.begin(list(self.gfs.monitors.values()))

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % trainer.accumulate_grad_batches:
                return
            job.starts(trainer.optimizers[0])
            if job.monitors or job.recorder.steps < job.plan.begin:
                return
            self.gfs.on_fit_start(trainer, pl_module)
            trainer.callbacks.append(self.gfs)  # its turn is after this one
            job.begin(list(self.gfs.monitors.values()))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            job.recorder.add_loss(None if loss is None else loss * trainer.accumulate_grad_batches)
            if trainer.global_step <= self.steps:
                return
            self.steps = trainer.global_step
            facts = {
                "framework": root.partition(".")[0],
                "precision": str(trainer.precision),
                "batch_size": batch_size(batch),
                "accumulation": trainer.accumulate_grad_batches,
                "batches_per_epoch": _whole(trainer.num_training_batches),
                "clipping": trainer.gradient_clip_val,
            }
            job.stepped(pl_module, trainer.optimizers[0], facts, lambda: _lightning_judged(trainer, pl_module))

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            job.leave(trainer.optimizers[0])

    return Watch()


def _lightning_schedule(trainer: Any, job: Watched) -> None:
    """Record the schedule: each scheduler is stepped at its own interval."""
    from lightning_gfs import _compat

    configs = [c for c in trainer.lr_scheduler_configs if not c.reduce_on_plateau]
    advance = _compat.advance_schedulers(trainer)
    if job.plan.schedule is not None:
        steps = float(job.plan.schedule or trainer.estimated_stepping_batches)
        job.schedule(trainer.optimizers[0], [c.scheduler for c in configs], steps, lambda step: advance())


def _lightning_judged(trainer: Any, module: Any) -> list[float] | None:
    """Losses of ``training_step`` on validation batches; ``None``: there are none."""
    from lightning_gfs import _compat
    from lightning_gfs.rate import validation_losses

    loader = _compat.validation_loader(trainer)
    return None if loader is None else validation_losses(trainer, module, loader) or None


def transformers(module: Any, plan: Plan, folder: Path) -> None:
    """Change the Trainer in ``module``, which has just been imported."""
    from hf_gfs.rate import sharing

    start, train = module.Trainer.__init__, module.Trainer.train

    @functools.wraps(start)
    def started(trainer: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(start).bind(trainer, *args, **kwargs)
        arguments = given.arguments.get("args")
        if arguments is not None:
            arguments.output_dir = str(folder / "job")  # the trainer makes this folder at once
            arguments.report_to = []
        start(*given.args, **given.kwargs)

    @functools.wraps(train)
    def watched(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = trainer.args
        if arguments.world_size > 1 or arguments.n_gpu > 1:
            raise ConfigError("the job runs in one process on one device here: set CUDA_VISIBLE_DEVICES=0")
        job = Watched(plan, folder)
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            setattr(arguments, name, type(getattr(arguments, name))("no"))
        arguments.load_best_model_at_end = arguments.push_to_hub = False
        _transformers_watch(trainer, job)
        with sharing(trainer, plan.share, plan.steps):
            train(trainer)
        job.leave()

    module.Trainer.__init__, module.Trainer.train = started, watched


def _transformers_watch(trainer: Any, job: Watched) -> None:
    from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback

    from hf_gfs import GFSCallback
    from hf_gfs.rate import validation_losses

    warnings.filterwarnings("ignore", message=".*measuring starts cold")  # it is meant to begin late
    handler = trainer.callback_handler
    own = next((c for c in handler.callbacks if isinstance(c, GFSCallback)), None)
    unwanted = (EarlyStoppingCallback, PrinterCallback, ProgressCallback, GFSCallback)
    handler.callbacks = [
        c
        for c in handler.callbacks
        if not isinstance(c, unwanted) and not type(c).__module__.startswith("transformers.integrations")
    ]
    gfs = GFSCallback(loss_fn=None if own is None else own.loss_fn, **job.options(own))
    training_step = trainer.training_step

    @functools.wraps(training_step)
    def seen(*args: Any, **kwargs: Any) -> Any:
        loss = training_step(*args, **kwargs)
        job.recorder.add_loss(loss * getattr(trainer, "current_gradient_accumulation_steps", 1))  # it is its share
        return loss

    trainer.training_step = seen

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            scheduler = kwargs["lr_scheduler"]
            job.schedule(kwargs["optimizer"], [scheduler], state.max_steps, lambda step: scheduler.step())
            if job.plan.begin == 0:
                job.begin([gfs.monitor] if gfs.monitor is not None else [])

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            job.starts(kwargs["optimizer"])
            if not job.monitors and job.recorder.steps == job.plan.begin > 0:
                gfs.set_trainer(trainer)  # the last callback now, so that its turn is still to come
                gfs.on_train_begin(args, state, control, **kwargs)
                job.begin([gfs.monitor] if gfs.monitor is not None else [])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loader = kwargs.get("train_dataloader")
            facts = {
                "framework": "transformers",
                "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "32",
                "batch_size": args.train_batch_size,
                "accumulation": args.gradient_accumulation_steps,
                "batches_per_epoch": _length(loader),
                "clipping": args.max_grad_norm or None,
            }
            job.stepped(kwargs["model"], kwargs["optimizer"], facts, lambda: validation_losses(trainer))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            job.leave(kwargs["optimizer"])

    if job.plan.begin == 0:
        gfs.set_trainer(trainer)
    trainer.add_callback(Watch())


def _whole(number: Any) -> int | None:
    return int(number) if math.isfinite(number) else None


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # a stream
        return None
