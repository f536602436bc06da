"""The adapter for the Hugging Face ``Trainer``: ``trainer.add_callback(GFSCallback())``."""

try:
    from hf_gfs.arguments import GFSArguments
    from hf_gfs.callback import GFSCallback
    from hf_gfs.rate import find_rate
except ModuleNotFoundError as error:
    if error.name is not None and error.name.partition(".")[0] in ("transformers", "accelerate"):
        raise ModuleNotFoundError(
            "hf_gfs needs transformers: pip install 'gfs-sharpness[hf]'", name=error.name
        ) from None
    raise

__all__ = ["GFSArguments", "GFSCallback", "find_rate"]
