"""LoRA+ with TRL: `python examples/with-trl.py --loraplus_lr_ratio 16` (docs/migrate/trl.md)."""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, TrlParser

import loraplus
from loraplus.integrations.trl import LoraPlusArguments

# (args,) = TrlParser((DPOConfig,)).parse_args_and_config()
(rates,) = TrlParser((LoraPlusArguments,)).parse_args_and_config()

torch.manual_seed(0)
words = "[PAD] [EOS] [UNK] the film was good bad".split()
tokens = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
tokens.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")
config = LlamaConfig(
    vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip
data = Dataset.from_dict({"prompt": ["the film "] * 32, "chosen": ["was good"] * 32, "rejected": ["was bad"] * 32})

with tempfile.TemporaryDirectory() as folder:
    args = DPOConfig(
        folder, learning_rate=2e-3, max_steps=10, logging_steps=2, per_device_train_batch_size=4, save_strategy="no",
        report_to=[], disable_tqdm=True, bf16=False, gradient_checkpointing=False, max_length=16,
        use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    trainer = DPOTrainer(
        LlamaForCausalLM(config), args=args, train_dataset=data, processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    # trainer.train()
    rates.attach(trainer).train()  # or loraplus.attach(trainer, lr_ratio=16).train()

print(loraplus.verify(trainer.model, trainer.optimizer, lr_ratio=rates.loraplus_lr_ratio, lr=2e-3))
