"""The metrics of a run, epoch by epoch: a .csv file and, on request, TensorBoard's events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import Argument, OutsideError
from ..files import metrics_path as metrics_path
from ..files import write_csv


def write_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the file by all rows, atomically; raise OutsideError if it cannot be written."""
    write_csv(path, rows, force=True)


class Events:
    """TensorBoard's events of a run, in a folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise OutsideError(
                Argument("log", "tensorboard"), " needs it: pip install 'harmconvert[tensorboard]'"
            ) from error
        self.writer = SummaryWriter(str(folder))

    def write(self, row: Mapping[str, Any]) -> None:
        """Write the metrics of one epoch."""
        for key, value in row.items():
            if isinstance(value, int | float) and key != "epoch":
                self.writer.add_scalar(key, value, row["epoch"])
        self.writer.flush()
