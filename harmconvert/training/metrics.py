"""Write the metrics of a run after each epoch: to a .csv file and, on request, to TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import Argument, OutsideError
from ..files import metrics_path as metrics_path
from ..files import write_csv


def write_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all rows to the file, atomically; raise OutsideError if the file cannot be written."""
    write_csv(path, rows, force=True)


class TensorBoardEvents:
    """Writes the metrics of a run to a folder, as events for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise OutsideError(
                Argument("log", "tensorboard"), " needs TensorBoard: pip install 'harmconvert[tensorboard]'"
            ) from error
        self.writer = SummaryWriter(str(folder))

    def write(self, row: Mapping[str, Any]) -> None:
        """Write the metrics of one epoch."""
        for key, value in row.items():
            if isinstance(value, int | float) and key != "epoch":
                self.writer.add_scalar(key, value, row["epoch"])
        self.writer.flush()
