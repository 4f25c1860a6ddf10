"""Cases of the scoreboard from public threads, and which case stands for which thread."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer as peft_optimizer
from stacks_cases import CannotRun, adapted, bert, library
from stacks_trainer import DATA, LR, QUIET, RATIO, Seen, judged, trained
from torch import nn
from transformers import Trainer, TrainingArguments

import loraplus

REPORTS = {
    "axolotl #2065: ratio 1 does not give the curve of plain LoRA": "ratio 1 is plain AdamW after 20 steps",
    "axolotl #1646: DPO needs wiring of its own": "TRL's DPOTrainer",
    "Soup #745: preference trainers ignore the ratio": "TRL's RewardTrainer",
    "axolotl #1910, sd-scripts #2125: a rate of its own for a named module": "a rate of its own by name",
    "LLaMA-Factory #2895: Trainer refuses an optimizer beside model_init": "Trainer with a model_init",
    "LLaMA-Factory #10144, ms-swift #8299, OpenRLHF #1225: empty groups crash": "no group is empty",
    "transformers #10140: rates by group without a subclass of Trainer": "Trainer, as it is",
    "transformers #29391, #40533: a search that includes LoRA's settings": (
        "Trainer, hyperparameter_search over ratio and rate"
    ),
    "mmengine #482, Lightning #7981, sd-scripts #1347: the log has one rate": "Trainer logs every group's rate",
    "sd-scripts #1233: which factor is B": "kohya layout (LyCORIS)",
    "sd-scripts #1929: Prodigy and two rates": "Prodigy",
    "DeepSpeed #7713: an optimizer of the JSON replaces the one with groups": "DeepSpeed's JSON names the optimizer",
    "DeepSpeed #6873, #8171: a scheduler's rate replaces those of the groups": "DeepSpeed's JSON names WarmupLR",
    "axolotl: the embedding's rate changes on resume": "resuming under another rate of embeddings",
    "all: a scheduler with rates of its own takes all groups to one": "OneCycleLR with one max_lr",
    "PEFT: embeddings in 8-bit optimizers": "8-bit AdamW: embeddings in 32 bits",
    "PEFT: a weight_decay that is given is overridden": "weight_decay= is honoured",
    "PEFT: FSDP1 puts every A at B's rate": "FSDP1, 2 processes, use_orig_params=True",
    "PEFT: DoRA's magnitudes at B's rate": "DoRA",
    "PEFT: an embedding's factors at 1e-6": "LoRA on an embedding",
    "all: a checkpoint's ratio outlives the one that is asked for": "resuming under another ratio",
}
"""{public thread, or what was measured where nobody has reported it: the case that stands for it}"""


class KeepsDecayOffA(Trainer):
    def get_decay_parameter_names(self, model: Any) -> list[str]:  # type: ignore[override]
        return [name for name in super().get_decay_parameter_names(model) if "lora_A" not in name]


def as_it_is(who: str) -> Seen:
    return judged(trained(who)[1].runs[0], lambda name: LR)


def decay_off_a(who: str) -> Seen:
    if who == "PEFT":
        raise CannotRun("Trainer does not ask its hooks where it is given an optimizer")
    trainer, _ = trained(who, KeepsDecayOffA, weight_decay=0.1)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    wrong = [name for name, decay in decays.items() if decay != (0 if "lora_A" in name else 0.1)]
    return ("wrong", f"{wrong[0]} decays at {decays[wrong[0]]:g}") if wrong else ("right", "")


def every_rate_logged(who: str) -> Seen:
    trainer, _ = trained(who, logging_steps=1)
    rates = {float(group["initial_lr"]) for group in trainer.optimizer.param_groups if group["params"]}
    first = trainer.state.log_history[0]
    logged = {float(value) for key, value in first.items() if key.startswith(("lr/", "learning_rate"))}
    if all(any(math.isclose(rate, one) for one in logged) for rate in rates):
        return "right", f"{len(rates)} rates"
    return "wrong", f"logs {min(logged):g} of the rates {', '.join(f'{rate:g}' for rate in sorted(rates))}"


def model_init(who: str) -> Seen:
    options: dict[str, Any] = {"model_init": lambda: adapted(), "train_dataset": DATA}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, **{**QUIET, "max_steps": 1, "learning_rate": LR, "optim": "sgd"})
        if who == "PEFT":
            own = peft_optimizer(adapted(), torch.optim.SGD, lr=LR, loraplus_lr_ratio=RATIO)  # type: ignore[arg-type]
            try:
                Trainer(args=args, optimizers=(own, None), **options)  # type: ignore[arg-type]
            except RuntimeError as error:
                raise CannotRun(f"Trainer: {error}") from None
            return "wrong", "taken, though it is over another model"
        trainer = loraplus.attach(Trainer(args=args, **options), lr_ratio=RATIO)
        trainer.train()
        return rates_in(trainer)


def rates_in(trainer: Any) -> Seen:
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    return judged({names[id(p)]: group["initial_lr"] for group in groups for p in group["params"]}, lambda name: LR)


def saved_after(change: Callable[[Any], None]) -> Callable[[str], Seen]:
    def case(who: str) -> Seen:
        trainer, _ = trained(who)
        change(trainer.model)
        with tempfile.TemporaryDirectory() as folder:
            trainer.save_model(folder)
        return "right", "saved"

    return case


def estimates_its_rate(module: str, name: str, lr: float) -> Callable[[str], Seen]:
    """B's 30th step at ratio 16 is 16 times that at ratio 1, or the optimizer is refused."""

    def moved(who: str, cls: Any, ratio: float) -> float:
        torch.manual_seed(0)
        model = adapted()
        if who == "PEFT":
            optimizer = peft_optimizer(model, cls, lr=lr, loraplus_lr_ratio=ratio)  # type: ignore[arg-type]
        else:
            optimizer = loraplus.create_optimizer(model, cls, lr=lr, lr_ratio=ratio)
        of_b = [p for name, p in model.named_parameters() if "lora_B" in name]
        before = [p.detach().clone() for p in of_b]
        for step in range(30):
            torch.manual_seed(step)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.randn_like(parameter)
            if step == 29:
                before = [p.detach().clone() for p in of_b]
            optimizer.step()
        return sum(float((p.detach() - old).norm()) for p, old in zip(of_b, before, strict=True))

    def case(who: str) -> Seen:
        cls = getattr(library(module), name)
        try:
            moved("PEFT", cls, RATIO)
        except RuntimeError as error:  # the optimizer's own refusal, at its first step
            if who == "PEFT":
                raise CannotRun(f"{name}: {error}") from None
        ratio = moved(who, cls, RATIO) / moved(who, cls, 1.0)
        if math.isclose(ratio, RATIO, rel_tol=0.1):
            return "right", f"{ratio:.3g} times"
        return "wrong", f"B moves {ratio:.3g} times as far at ratio 16 as at ratio 1, silently"

    return case


def skipped_steps(who: str) -> Seen:
    """fp16 with a GradScaler, whose first steps overflow and are skipped."""
    model = adapted()
    if who == "PEFT":
        optimizer = peft_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO)  # type: ignore[arg-type]
    else:
        optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=LR, lr_ratio=RATIO)
    scaler, skipped = torch.amp.GradScaler("cpu"), 0
    for _ in range(12):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(input_ids=torch.arange(32).reshape(4, 8), labels=torch.tensor([0, 1, 0, 1])).loss * 1e3
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped += scaler.get_scale() < scale
    broken = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if not skipped:
        raise CannotRun("no step overflowed on this machine")
    return ("wrong", f"{broken[0]} is not finite") if broken else ("right", f"{skipped} steps skipped")


def own_rate_by_name(who: str) -> Seen:
    """The first layer at a tenth of every rate."""
    if who == "PEFT":
        raise CannotRun("no such option")
    model = adapted()
    part = {r"layer\.0\.": 0.5}
    optimizer = loraplus.create_optimizer(model, torch.optim.SGD, lr=LR, lr_ratio=RATIO, lr_overrides=part)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return judged(rates, lambda name: LR / 2 if "layer.0." in name else LR)


def frozen_adapter(who: str) -> Seen:
    """An adapter that was loaded without is_trainable=True: everything is frozen."""
    with tempfile.TemporaryDirectory() as folder:
        adapted().save_pretrained(folder)
        model = PeftModel.from_pretrained(bert(), folder)
    if who == "PEFT":
        optimizer = peft_optimizer(model, torch.optim.SGD, lr=LR, loraplus_lr_ratio=RATIO)  # type: ignore[arg-type]
    else:
        optimizer = loraplus.create_optimizer(model, torch.optim.SGD, lr=LR, lr_ratio=RATIO)
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    return "wrong", f"an optimizer over {count} parameters, silently"


def added_later(who: str) -> Seen:
    """An adapter that is added after the optimizer was built."""
    model = adapted()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if who == "PEFT":
            optimizer = peft_optimizer(model, torch.optim.SGD, lr=LR, loraplus_lr_ratio=RATIO)  # type: ignore[arg-type]
        else:
            optimizer = loraplus.create_optimizer(model, torch.optim.SGD, lr=LR, lr_ratio=RATIO)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))  # type: ignore[operator]
        model.set_adapter("second")  # type: ignore[operator]
        for _ in range(2):
            model(input_ids=torch.arange(32).reshape(4, 8), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
            optimizer.step()
    told = [str(entry.message) for entry in caught if issubclass(entry.category, loraplus.LoraPlusWarning)]
    return ("warned", told[0]) if told else ("wrong", "the second adapter does not learn, silently")


def embeddings_resume(who: str) -> Seen:
    """A Trainer's checkpoint with embeddings at 1e-4, resumed by a run that asks for 1e-6 there."""

    def trainer(folder: str, rate: float, steps: int) -> Trainer:
        args = TrainingArguments(
            folder, **{**QUIET, "max_steps": steps, "save_strategy": "steps", "save_steps": 2, "learning_rate": LR}
        )
        model = adapted(target_modules=["query", "word_embeddings"])
        if who == "PEFT":
            rates: dict[str, Any] = {"lr": LR, "loraplus_lr_ratio": RATIO, "loraplus_lr_embedding": rate}
            own = peft_optimizer(model, torch.optim.AdamW, **rates)  # type: ignore[arg-type]
            return Trainer(model, args, train_dataset=DATA, optimizers=(own, None))  # type: ignore[arg-type]
        return loraplus.attach(Trainer(model, args, train_dataset=DATA), lr_ratio=RATIO, lr_embedding=rate)  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory() as folder:
        trainer(folder, 1e-4, 2).train()
        second = trainer(folder, 1e-6, 4)
        try:
            second.train(resume_from_checkpoint=True)
        except loraplus.ResumeMismatchError as error:
            return "refused", f"ResumeMismatchError: {error}".replace(folder, "out")
        names = {id(p): name for name, p in second.model.named_parameters()}
        groups = second.optimizer.param_groups
        rate = next(g["initial_lr"] for g in groups for p in g["params"] if "embedding" in names[id(p)])
    return ("right" if math.isclose(rate, 1e-6) else "wrong"), f"goes on at {rate:g}, silently"


def accelerate_resume(who: str) -> Seen:
    """Accelerate's load_state of a run at ratio 16, in a run that asks for 2."""
    accelerate = library("accelerate")

    def prepared(ratio: float) -> tuple[Any, Any]:
        accelerator = accelerate.Accelerator(cpu=True)  # type: ignore[attr-defined]
        model = adapted()
        if who == "PEFT":
            own = peft_optimizer(model, torch.optim.SGD, lr=LR, loraplus_lr_ratio=ratio)  # type: ignore[arg-type]
        else:
            own = loraplus.create_optimizer(model, torch.optim.SGD, lr=LR, lr_ratio=ratio)
        model, own = accelerator.prepare(model, own)
        if who == "loraplus":
            from loraplus.integrations.accelerate import register_rates

            register_rates(accelerator, model, own)
        return accelerator, own

    with tempfile.TemporaryDirectory() as folder:
        prepared(16.0)[0].save_state(folder)
        accelerator, optimizer = prepared(2.0)
        try:
            accelerator.load_state(folder)
        except loraplus.ResumeMismatchError as error:
            return "refused", f"ResumeMismatchError: {error}".replace(folder, "out")
    rates = [group["lr"] for group in optimizer.param_groups if group["params"]]
    return (
        "right" if max(rates) == 2 * min(rates) else "wrong"
    ), f"goes on at ratio {max(rates) / min(rates):g}, silently"


def averaged_weights(who: str) -> Seen:
    """Lightning's StochasticWeightAveraging with one rate, from the second epoch on."""
    import logging

    pl: Any = library("lightning.pytorch")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.ratios = adapted(), []

        def training_step(self, batch: Any, index: int) -> Any:
            groups = self.optimizers().param_groups
            rates = [group["lr"] for group in groups if group["params"]]
            self.ratios.append(max(rates) / min(rates))
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            if who == "PEFT":
                return peft_optimizer(self.model, torch.optim.SGD, lr=LR, loraplus_lr_ratio=RATIO)  # type: ignore[arg-type]
            return loraplus.create_optimizer(self, torch.optim.SGD, lr=LR, lr_ratio=RATIO)

    rows = [{"input_ids": torch.arange(8), "labels": torch.tensor(index % 2)} for index in range(8)]
    callbacks = [pl.callbacks.StochasticWeightAveraging(LR / 10, swa_epoch_start=1, annealing_epochs=1)]
    if who == "loraplus":
        from loraplus.integrations.lightning import LoraPlusCallback

        callbacks.append(LoraPlusCallback(RATIO))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    module = Module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=callbacks, **quiet)
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
    told = [str(entry.message) for entry in caught if issubclass(entry.category, loraplus.LoraPlusWarning)]
    if all(math.isclose(ratio, RATIO, rel_tol=1e-3) for ratio in module.ratios):
        return "right", f"{len(module.ratios)} steps"
    return ("warned", told[0]) if told else ("wrong", f"goes on at ratio {module.ratios[-1]:.3g}, silently")


def _words() -> Any:
    """A tokenizer of a few words; nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<unk>", *"grass is green red snow white black".split()]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(names, range(len(names)), strict=True)), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def trl_trainer(kind: str, row: dict[str, Any], *, rewards: bool = False) -> Callable[[str], Seen]:
    """A trainer of TRL, with PEFT's optimizer in its `optimizers`, or attached."""

    def case(who: str) -> Seen:
        trl: Any = library("trl")
        datasets: Any = library("datasets")
        from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=1, num_labels=1,
        )  # fmt: skip
        base = LlamaForSequenceClassification if rewards else LlamaForCausalLM
        model = adapted(lambda: base(config), target_modules=["q_proj", "v_proj"])
        options: dict[str, Any] = {}
        if who == "PEFT":
            own = peft_optimizer(model, torch.optim.SGD, lr=LR, loraplus_lr_ratio=RATIO)  # type: ignore[arg-type]
            options["optimizers"] = own, None
        with tempfile.TemporaryDirectory() as folder:
            args = getattr(trl, f"{kind}Config")(
                folder, **{**QUIET, "max_steps": 1, "learning_rate": LR, "optim": "sgd", "bf16": False}
            )
            data = datasets.Dataset.from_list([row] * 4)
            trainer = getattr(trl, f"{kind}Trainer")(
                model, args=args, train_dataset=data, processing_class=_words(), **options
            )
            (trainer if who == "PEFT" else loraplus.attach(trainer, lr_ratio=RATIO)).train()
        return rates_in(trainer)

    return case


def _freeze(model: nn.Module) -> None:
    model.requires_grad_(False)


def _disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()


_PREFERENCE = {"prompt": "grass is", "chosen": "green", "rejected": "red"}
_REWARD = {"chosen": "grass is green", "rejected": "grass is red"}
PUBLIC: dict[str, Callable[[str], Seen]] = {
    "Trainer, as it is": as_it_is,
    "Trainer with a model_init": model_init,
    "Trainer that keeps weight decay off A (get_decay_parameter_names)": decay_off_a,
    "Trainer logs every group's rate": every_rate_logged,
    "Trainer, saving after everything is frozen": saved_after(_freeze),
    "Trainer, saving after the adapter is disabled": saved_after(_disable),
    "TRL's SFTTrainer": trl_trainer("SFT", {"text": "grass is green"}),
    "TRL's DPOTrainer": trl_trainer("DPO", _PREFERENCE),
    "TRL's RewardTrainer": trl_trainer(
        "Reward", {"chosen": "grass is green", "rejected": "grass is red"}, rewards=True
    ),
    "resuming under another rate of embeddings": embeddings_resume,
    "Accelerate, load_state under another ratio": accelerate_resume,
    "Lightning, StochasticWeightAveraging with one rate": averaged_weights,
    "Prodigy": estimates_its_rate("prodigyopt", "Prodigy", 1.0),
    "D-Adaptation (pytorch-optimizer)": estimates_its_rate("pytorch_optimizer", "DAdaptAdam", 1.0),
    "AdaFactor of pytorch-optimizer": estimates_its_rate("pytorch_optimizer", "AdaFactor", 1e-3),
    "fp16, first steps skipped by GradScaler": skipped_steps,
    "a rate of its own by name": own_rate_by_name,
    "an adapter loaded without is_trainable=True": frozen_adapter,
    "an adapter added after the optimizer was built": added_later,
}
