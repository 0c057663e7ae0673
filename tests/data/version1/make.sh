#!/bin/bash
# Writes the checkpoints with the release whose files they are (0.1.0, format version 1). Run it in this folder.
set -e
python - <<'P'
import torch
from safetensors.torch import save_file
from digits_network import make
torch.manual_seed(0)
net = make()
for m in net.modules():
    if isinstance(m, torch.nn.BatchNorm2d):
        m.running_mean.normal_(0, 0.2); m.running_var.uniform_(0.5, 2)
save_file(net.state_dict(), "weights.safetensors")
P
c() { harmconvert convert digits_network.py:make --checkpoint weights.safetensors --force "$@"; }
c -o whole.safetensors
c --lambda 2 --include 'last' --include depthwise -o lambda2.safetensors
c --lambda 'last=2' --calibrate sample:mnist5k --calibration-images 64 -o calibrated.safetensors
c --lambda 'last=2,stem=4' --basis klt -o klt.safetensors
c --lambda 'last=3' --basis haar -o haar.safetensors
c --lambda 'last=2' --dtype float16 -o float16.safetensors
c --budget params=80% --calibrate sample:mnist5k --calibration-images 64 --trials 2 -o searched.safetensors
harmconvert finetune lambda2.safetensors --model digits_network.py:make --dataset sample:mnist5k --epochs 1 --hflip 0 --scale 0.7 1 -o finetuned.safetensors --force 
harmconvert convert digits_network.py:make --checkpoint weights.safetensors --lambda 'last=2' --save-plan plan.json -o /tmp/unused.safetensors --force
rm -f finetuned.metrics.csv
mv make-harmonic.probes.json probes.json
python record.py
