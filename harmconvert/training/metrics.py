"""The figures of a run, epoch by epoch: a .csv file, and TensorBoard's events where they are wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import OutsideError
from ..files import metrics_path as metrics_path
from ..files import write_csv


def write_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all rows anew, whole or not at all; raises OutsideError where that fails."""
    write_csv(path, rows, force=True)


class Events:
    """TensorBoard's events of a run, in a folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise OutsideError("--log tensorboard needs it: pip install 'harmconvert[tensorboard]'") from error
        self.writer = SummaryWriter(str(folder))

    def write(self, row: Mapping[str, Any]) -> None:
        """One epoch's figures."""
        for key, value in row.items():
            if isinstance(value, int | float) and key != "epoch":
                self.writer.add_scalar(key, value, row["epoch"])
        self.writer.flush()
