"""Record what the present release reads from the checkpoints in this folder: expected.json.

Run by make.sh with the release that wrote them, and never again: the tests compare later releases with this record.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from digits_network import make

import harmconvert as hc

HERE = Path(__file__).parent


def main() -> None:
    expected = {}
    for path in sorted(HERE.glob("*.safetensors")):
        if path.stem == "weights":
            continue
        record: dict[str, Any] = {"file": hashlib.sha256(path.read_bytes()).hexdigest()}
        images = torch.linspace(-1, 1, 2 * 28 * 28).reshape(2, 1, 28, 28)
        network = hc.load(path, model=make()).eval()
        record["tensors"] = {
            key: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} "
            + hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            for key, tensor in sorted(network.state_dict().items())
        }
        record["outputs"] = network.float()(images).tolist()
        expected[path.stem] = record
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
