"""An adapter of a sentence encoder with LoRA+: `python examples/plugins/with-sentence-transformers.py`."""

from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss

import loraplus

model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=8, target_modules=["query", "value"]))
pairs = Dataset.from_dict({
    "anchor": ["a plane takes off", "a man plays the flute"],
    "positive": ["an aircraft leaves the ground", "somebody plays an instrument"],
})  # fmt: skip
args = SentenceTransformerTrainingArguments("out", learning_rate=1e-4, num_train_epochs=1)
trainer = SentenceTransformerTrainer(model, args, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))
loraplus.attach(trainer, lr_ratio=16)  # the one new line
trainer.train()
