"""The model that the scripts of this folder train: one layer with an adapter in PEFT's layout, in torch alone."""

import torch


class Adapted(torch.nn.Module):
    """y = W x + B A x."""

    def __init__(self, inputs: int = 16, outputs: int = 8, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = torch.nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(inputs, rank, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(rank, outputs, bias=False)})
        torch.nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(Adapted(16, 8), torch.nn.Tanh(), Adapted(8, 2))


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.randn(8, 16)).square().mean()
