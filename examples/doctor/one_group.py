"""Off: a flag asks for a ratio, `--lr-ratio 16`, and nothing reads it."""

import argparse

import torch
from small import loss_of, network

parser = argparse.ArgumentParser()
parser.add_argument("--lr-ratio", type=float, default=16.0)
arguments = parser.parse_args()

model = network()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for _ in range(100):
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
