"""`attach` in trainers that derive from transformers': Seq2SeqTrainer, sentence-transformers', Unsloth's interface."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_bert
from datasets import Dataset
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from stacks.models import language_model, tokenizer
from stacks.trainers import BAD, GOOD, PROMPTS, rows_for
from transformers import (
    BertForMaskedLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

import loraplus
from loraplus.errors import TrainerSetupError


def options(tmp_path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path), "learning_rate": 1e-3, "weight_decay": 0.1, "max_steps": 2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4, "save_steps": 1, "logging_steps": 1,
    }  # fmt: skip


def proved(trainer: Any, **rates: float) -> None:
    """Trains at λ = 4, and holds the optimizer, the log and the checkpoint to it."""
    loraplus.attach(trainer, lr_ratio=4, **rates).train()
    loraplus.verify(trainer.model, trainer.optimizer, lr=1e-3, lr_ratio=4, **rates)
    assert trainer.state.log_history[0]["lr/lora_B"] == pytest.approx(4e-3)
    assert trainer.loraplus_rates.lr_ratio == 4


@pytest.mark.plugin("Seq2SeqTrainer")
def test_seq2seq_trainer_trains_at_the_ratio(tmp_path):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    ))  # fmt: skip
    rows = [{"input_ids": [5, 6, 7], "labels": [7, 6, 5]}] * 12
    args = Seq2SeqTrainingArguments(**options(tmp_path), predict_with_generate=True)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    proved(Seq2SeqTrainer(adapted, args, train_dataset=Dataset.from_list(rows)))


@pytest.fixture
def sentence_modules():
    return pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")


def adapt(model: Any) -> None:
    """What `model.add_adapter` does, which wants a newer PEFT than this one."""
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["query", "value"]), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "classifier" in name)


def folder(tmp_path, model: Any) -> str:
    path = tmp_path / "model"
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.plugin("sentence-transformers")
def test_sentence_transformer_trainer_trains_at_the_ratio_with_a_loss_of_parameters_beside(sentence_modules, tmp_path):
    st = sentence_modules
    from sentence_transformers.sentence_transformer.losses import SoftmaxLoss

    model = st.SentenceTransformer(folder(tmp_path, tiny_bert().base_model), device="cpu")
    adapt(model)
    rows = Dataset.from_dict({"premise": PROMPTS, "hypothesis": GOOD, "label": [i % 2 for i in range(24)]})
    loss = SoftmaxLoss(model, 16, num_labels=2)  # has a matrix of its own
    trainer = st.SentenceTransformerTrainer(
        model, st.SentenceTransformerTrainingArguments(**options(tmp_path)), train_dataset=rows, loss=loss
    )
    proved(trainer)
    held = {id(parameter): group["lr"] for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert id(loss.classifier.weight) in held


@pytest.mark.plugin("sentence-transformers")
def test_cross_encoder_trainer_trains_at_the_ratio(sentence_modules, tmp_path):
    st = sentence_modules
    model = st.CrossEncoder(folder(tmp_path, tiny_bert(num_labels=1)), device="cpu", num_labels=1)
    adapt(model)
    rows = Dataset.from_dict({"query": PROMPTS, "text": GOOD, "label": [float(i % 2) for i in range(24)]})
    args = st.cross_encoder.CrossEncoderTrainingArguments(**options(tmp_path))
    proved(st.cross_encoder.CrossEncoderTrainer(model, args, train_dataset=rows), lr_head=5e-4)


@pytest.mark.plugin("sentence-transformers")
def test_sparse_encoder_trainer_trains_at_the_ratio(sentence_modules, tmp_path):
    sparse = sentence_modules.sparse_encoder
    torch.manual_seed(0)
    model = sparse.SparseEncoder(folder(tmp_path, BertForMaskedLM(tiny_bert().config)), device="cpu")
    adapt(model)
    rows = Dataset.from_dict({"query": PROMPTS, "good": GOOD, "bad": BAD})
    loss = sparse.losses.SpladeLoss(
        model, sparse.losses.SparseMultipleNegativesRankingLoss(model), document_regularizer_weight=1e-3
    )
    args = sparse.SparseEncoderTrainingArguments(**options(tmp_path))
    proved(sparse.SparseEncoderTrainer(model, args, train_dataset=rows, loss=loss))


@pytest.fixture
def unsloth(tmp_path):
    """Unsloth's trainer as its 2026.10 publishes it: groups of its own where an embedding has a rate or B a ratio."""
    trl = pytest.importorskip("trl", reason="trl is not installed")

    class UnslothTrainer(trl.SFTTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            embedding, ratio = (getattr(self.args, name, None) for name in ("embedding_lr", "loraplus_lr_ratio"))
            if embedding is None and ratio is None:
                return super().create_optimizer(*([] if model is None else [model]))
            cls, kwargs = trl.SFTTrainer.get_optimizer_cls_and_kwargs(self.args)
            groups: dict[float, list[Any]] = {}
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    lr = embedding or kwargs["lr"] if "modules_to_save" in name else kwargs["lr"]
                    groups.setdefault(lr * (ratio or 1) if ".lora_B." in name else lr, []).append(parameter)
            self.optimizer = cls([{"params": each, "lr": lr} for lr, each in groups.items()], **kwargs)
            return self.optimizer

    def make(model: Any, **own: float) -> Any:
        args = trl.SFTConfig(**options(tmp_path), max_length=16, bf16=False, gradient_checkpointing=False)
        for name, value in own.items():
            setattr(args, name, value)
        return UnslothTrainer(model=model, args=args, train_dataset=rows_for("SFT"), processing_class=tokenizer())

    return make


@pytest.mark.plugin("Unsloth")
def test_published_interface_of_unsloth_trains_at_the_ratio(unsloth):
    proved(unsloth(language_model()))


@pytest.mark.plugin("Unsloth")
def test_published_interface_of_unsloth_keeps_the_rate_of_its_embeddings(unsloth):
    model = language_model("none").unload()
    model.config.tie_word_embeddings = False
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    trainer = loraplus.attach(unsloth(get_peft_model(model, config), embedding_lr=5e-5), lr_ratio=4)
    trainer.create_optimizer()
    rates = {entry.role: entry.lr for entry in loraplus.explain(trainer.model, trainer.optimizer).entries}
    assert rates == pytest.approx({"lora_A": 1e-3, "lora_B": 4e-3, "embedding": 5e-5})


@pytest.mark.plugin("Unsloth")
def test_published_interface_of_unsloth_a_ratio_in_both_places_is_refused(unsloth):
    with pytest.raises(TrainerSetupError, match="set LoRA"):
        loraplus.attach(unsloth(language_model(), loraplus_lr_ratio=16), lr_ratio=16).create_optimizer()
