"""TRL's SFTTrainer with LoRA+, packed batches, and an evaluation that counts every token once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from loraplus.integrations.transformers import LoraPlusTrainingArguments
from loraplus.speed.loss import ChunkedLoss
from loraplus.tasks.data_parallel import DataParallelTrainer
from loraplus.tasks.measures import perplexity
from loraplus.tasks.packing import PackingCollator
from loraplus.tasks.target_rows import IGNORED, TargetRows


@dataclass
class LanguageTrainingArguments(LoraPlusTrainingArguments, SFTConfig):
    """SFTConfig with the rates of LoRA+. Defaults of settings that both classes have are those of TrainingArguments."""


def token_metrics(prediction: Any) -> dict[str, float]:
    """Mean loss over all target tokens, and its perplexity.

    Args:
        prediction: EvalPrediction with each example's summed loss (examples,), and as label its number of target
            tokens (examples,).
    """
    loss = float(np.sum(prediction.predictions, dtype=np.float64) / np.sum(prediction.label_ids))
    return {"loss": loss, "perplexity": perplexity(loss)}


class LanguageTrainer(DataParallelTrainer, SFTTrainer):
    """SFTTrainer over tokenised rows.

    The loss of a step is the mean over the target tokens of the whole batch, in whatever rows, parts and processes they
    are. Evaluation sums over tokens and examples, where Trainer takes the mean of batches' means.

    Args:
        packing: how to pack training batches; None pads them.
        train_dataset, eval_dataset: rows of tokens and labels.
        **options: of SFTTrainer.
    """

    def __init__(
        self, *, packing: PackingCollator | None, train_dataset: TargetRows, eval_dataset: TargetRows, **options: Any
    ) -> None:
        # SFTTrainer takes nothing but a Dataset, which it looks at the first row of.
        first = Dataset.from_list([train_dataset[0]])
        super().__init__(compute_metrics=token_metrics, train_dataset=first, eval_dataset=first, **options)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.packing = packing
        self.model_accepts_loss_kwargs = True  # SFTTrainer divides by the number of target tokens, whatever the model

    def get_train_dataloader(self) -> DataLoader:
        """Batches that are packed, if they are to be; those of evaluation never are."""
        padding = self.data_collator
        self.data_collator = self.packing or padding
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = padding

    def weighted(self, part: dict[str, Any], weight: float) -> dict[str, Any]:
        """A part counts by its target tokens, so it needs no weight. A part of weight 0 loses its targets."""
        return part if weight else {**part, "labels": torch.full_like(part["labels"], IGNORED)}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the target tokens; in training by the model's own loss where `speed_up` takes it in chunks.

        TRL's fused output layer works out entropy and accuracy of every token beside it, which nobody reads here.
        """
        plain = self.label_smoother is None and self.compute_loss_func is None and not self.aux_loss_enabled
        chunked = isinstance(getattr(self.accelerator.unwrap_model(self.model), "loss_function", None), ChunkedLoss)
        if return_outputs or not (self.model.training and plain and chunked and self.args.loss_type == "nll"):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"][..., 1:] != IGNORED).sum()
        items = torch.as_tensor(num_items_in_batch).clamp(min=1)  # a part without targets counts as zero
        loss = model(**inputs, use_cache=False, num_items_in_batch=items).loss
        return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Each example's summed loss (batch,), and its number of target tokens (batch,)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        return None, -outputs.log_probs.float().sum(dim=-1), outputs.label_mask.sum(dim=-1)

    def create_model_card(self, *_: object, **__: object) -> None:
        """PEFT writes the adapter's card."""

    def _send_telemetry(self) -> None:
        """TRL would report each of a study's many runs to its makers."""
