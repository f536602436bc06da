"""The same training from a YAML file; every option of the callback has a flag and a help text.

Run:  python examples/lightning/cli.py fit --config examples/lightning/digits.yaml
Help: python examples/lightning/cli.py fit --trainer.callbacks.help=lightning_gfs.GFSCallback
"""

from digits import Digits, DigitsData
from lightning.pytorch.cli import LightningCLI

if __name__ == "__main__":
    LightningCLI(Digits, DigitsData)
