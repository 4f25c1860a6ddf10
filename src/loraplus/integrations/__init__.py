"""LoRA+ in the training stacks people use: one file a stack."""
