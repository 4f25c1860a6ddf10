"""Off: the groups say 16, and the optimizer's step reads the rate that it was built with."""

import torch
from small import loss_of, network

RATIO = 16


class OneRate(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=self.defaults["lr"])


model = network()
a = [p for name, p in model.named_parameters() if "lora_A" in name]
b = [p for name, p in model.named_parameters() if "lora_B" in name]
optimizer = OneRate([{"params": a, "lr": 1e-3}, {"params": b, "lr": RATIO * 1e-3}])
for _ in range(100):
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
