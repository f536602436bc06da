"""The adapter for Lightning: ``Trainer(callbacks=[GFSCallback()])``."""

try:
    from lightning_gfs.callback import GFSCallback
    from lightning_gfs.rate import find_rate
except ModuleNotFoundError as error:
    if error.name is not None and error.name.partition(".")[0] in ("lightning", "pytorch_lightning"):
        raise ModuleNotFoundError(
            "lightning_gfs needs Lightning: pip install 'gfs-sharpness[lightning]'", name=error.name
        ) from None
    raise

__all__ = ["GFSCallback", "find_rate"]
