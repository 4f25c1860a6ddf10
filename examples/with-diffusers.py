"""LoRA+ with diffusers: a U-Net and a text encoder at ratios of their own (docs/migrate/diffusers.md)."""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from transformers import CLIPTextConfig, CLIPTextModel

import loraplus

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16, attention_head_dim=8,
)  # fmt: skip
config = CLIPTextConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0,
    eos_token_id=1, pad_token_id=1,
)  # fmt: skip
text_encoder = CLIPTextModel(config)
noise_schedule = DDPMScheduler(num_train_timesteps=100)
for model in (unet, text_encoder):
    model.requires_grad_(False)
unet.add_adapter(LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), text_encoder)

# parameters = [p for model in (unet, text_encoder) for p in model.parameters() if p.requires_grad]
# optimizer = torch.optim.AdamW(parameters, lr=1e-3)
groups = [
    {**group, "name": f"{part}.{group['name']}"}
    for part, model, ratio in (("unet", unet, 16), ("text_encoder", text_encoder, 4))
    for group in loraplus.param_groups(model, lr=1e-3, lr_ratio=ratio)
]
optimizer = torch.optim.AdamW(groups)

for step in range(5):
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    timesteps = torch.randint(0, 100, (2,))
    context = text_encoder(torch.randint(0, 64, (2, 8))).last_hidden_state
    predicted = unet(noise_schedule.add_noise(latents, noise, timesteps), timesteps, context).sample
    loss = torch.nn.functional.mse_loss(predicted, noise)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")

print(loraplus.verify(unet, optimizer, lr_ratio=16, lr=1e-3))
print(loraplus.verify(text_encoder, optimizer, lr_ratio=4, lr=1e-3))
