"""A layer with Megatron-Bridge's names, and its groups: `python examples/plugins/with-megatron-names.py`."""

import torch

import loraplus


class Adapter(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.linear_in = torch.nn.Linear(inputs, rank, bias=False)
        self.linear_out = torch.nn.Linear(rank, outputs, bias=False)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_wrap = torch.nn.Linear(32, 64).requires_grad_(False)
        self.adapter = Adapter(32, 64, 4)


model = torch.nn.ModuleDict({"linear_qkv": Layer(), "linear_proj": Layer()})
optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-4, lr_ratio=16)
print(loraplus.verify(model, optimizer, lr_ratio=16))
