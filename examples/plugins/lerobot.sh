#!/bin/sh
# An adapter of SmolVLA with LoRA+. The old line: lerobot-train \
python -m loraplus.integrations.lerobot --loraplus.lr_ratio=16 \
    --policy.path=lerobot/smolvla_base --policy.repo_id=me/smolvla-loraplus \
    --dataset.repo_id=lerobot/svla_so101_pickplace \
    --peft.method_type=LORA --peft.r=16 \
    --steps=20000 --batch_size=32
