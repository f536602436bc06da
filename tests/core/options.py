"""A value for every option that is not its default: both adapters must bring each one through."""

NOT_DEFAULT = {
    "tier": "gfs_full",
    "every": 7,
    "max_overhead": 0.5,
    "directional_every": 3,
    "running_every": 4,
    "running_parts": 8,
    "batch_sharpness_every": 11,
    "sharpness_every": 6,
    "gfs_every": 9,
    "directional": "losses",
    "horizon": 2.5,
    "probe": "fixed",
    "probe_batches": 2,
    "probe_size": 300,
    "micro_batch": 3,
    "max_memory": 2.5,
    "sync": "local",
    "hvp": "gradients",
    "precision": "float32",
    "tol": 0.05,
    "rtol": 0.002,
    "max_hvps": 33,
    "max_grads": 44,
    "control": "follow",
    "margin": 0.3,
    "alarm": "warn",
    "alarm_checkpoint": True,
    "history": "somewhere.jsonl",
    "strict": True,
    "seed": 5,
}

# What an option needs beside it to be accepted.
BESIDE: dict[str, dict[str, object]] = {"gfs_every": {"tier": "gfs_full"}}
