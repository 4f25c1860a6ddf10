"""The scoreboard: the same cases through PEFT's `create_loraplus_optimizer` and through loraplus; who is right.

    python benchmarks/stacks.py             # prints all; writes benchmarks/results/stacks.csv and docs/scoreboard.md
    python benchmarks/stacks.py --new       # runs the cases that are not in the results yet, and writes them in
    python benchmarks/stacks.py torchtune   # prints the cases whose name has "torchtune"; writes nothing

**The check, the same for both.** It does not ask either library which parameter is what. Each case lists by hand which
names are B (`stacks_cases.RATES`: the factor that makes a linear layer's output); those must learn at 16·lr, all other
trained parameters at lr. The rate that a parameter really has is read off its weights: all are set to 1, one SGD step
is made with gradient 0 and one with gradient 1, and

    rate = (drop with gradient 1) − (drop with gradient 0),    weight decay = (drop with gradient 0) / rate.

A case judges one thing, so that one defect counts once: empty groups and weight decay have lines of their own. What a
tool refuses with an error of its own counts as refused, neither right nor wrong; what it goes on with and says so, with
what did it, as warned. What cannot run counts for nobody.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import importlib.metadata
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft.optimizers import create_loraplus_optimizer as peft_optimizer
from stacks_cases import RATES, CannotRun, Case, adapted, kohya, library, tied
from stacks_deepspeed import DEEPSPEED
from stacks_later import LATER
from stacks_processes import WRAPPINGS
from stacks_reports import PUBLIC, REPORTS
from stacks_trainer import TRAINER
from torch import nn

import loraplus

HERE = Path(__file__).resolve().parent
PAGE, RESULTS = HERE.parent / "docs" / "scoreboard.md", HERE / "results" / "stacks.csv"
LR, RATIO, DECAY = 1 / 64, 16.0, 0.125
SECONDS = 180  # for one case in two processes
WHO = ("PEFT", "loraplus")


class Verdict(NamedTuple):
    """right, wrong, refused, warned or cannot run, and what was seen."""

    kind: str
    detail: str = ""


Judge = Callable[[str], Verdict]
"""Runs one case as "PEFT" or as "loraplus"."""


def make(
    who: str, model: nn.Module, cls: type[torch.optim.Optimizer] = torch.optim.SGD, **options
) -> torch.optim.Optimizer:
    if who == "PEFT":
        return peft_optimizer(model, cls, lr=LR, loraplus_lr_ratio=RATIO, **options)  # type: ignore[arg-type]
    optimizer = loraplus.create_optimizer(model, cls, lr=LR, lr_ratio=RATIO, **options)
    loraplus.verify(model, optimizer, lr_ratio=RATIO, lr=LR)
    return optimizer


def drops(model: nn.Module, optimizer: torch.optim.Optimizer, gradient: float) -> dict[str, set[float]]:
    """How far every trained weight falls from 1 in one step; several values if its elements differ."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.fill_(1.0)
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return {name: set((1.0 - p.detach().double()).flatten().tolist()) for name, p in trained.items()}


def measured(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """{name: (rate, weight decay)}, read off the weights."""
    idle, moved = drops(model, optimizer, 0.0), drops(model, optimizer, 1.0)
    measurements = {}
    for name in moved:
        (still,), (drop,) = idle[name], moved[name]
        measurements[name] = (drop - still, still / (drop - still) if drop != still else 0.0)
    return measurements


def compare(rates: dict[str, float], b: str) -> Verdict:
    """Holds measured rates against lr and 16·lr."""
    wrong = []
    for name, rate in rates.items():
        asked = LR * RATIO if re.search(b, name) else LR
        if not math.isclose(rate, asked, rel_tol=1e-4):
            wrong.append(f"{name.removeprefix('base_model.model.')} at {rate / LR:.3g}·lr instead of {asked / LR:g}·lr")
    if not wrong:
        return Verdict("right", f"{len(rates)} parameters")
    return Verdict("wrong", f"{len(wrong)} of {len(rates)} parameters, such as {wrong[0]}")


def rates_of(case: Case) -> Judge:
    def judge(who: str) -> Verdict:
        model = case.build()
        if not any(re.search(case.b, name) for name, p in model.named_parameters() if p.requires_grad):
            raise AssertionError("the case's own pattern for B matches nothing")
        measurements = measured(model, make(who, model))
        return compare({name: rate for name, (rate, _) in measurements.items()}, case.b)

    return judge


def empty_groups(who: str) -> Verdict:
    groups = make(who, adapted()).param_groups
    empty = sum(not group["params"] for group in groups)
    return Verdict("wrong" if empty else "right", f"{empty} of {len(groups)} groups are empty")


def weight_decay(who: str) -> Verdict:
    """Asked for as `weight_decay=`, on everything but biases and norms."""
    model = adapted(modules_to_save=["classifier", "LayerNorm"])
    measurements = measured(model, make(who, model, weight_decay=DECAY))
    exempt = re.compile(r"bias$|LayerNorm")
    wrong = [
        f"{name} decays at {decay:.3g}"
        for name, (_, decay) in measurements.items()
        if not math.isclose(decay, 0.0 if exempt.search(name) else DECAY, rel_tol=1e-3, abs_tol=1e-6)
    ]
    if wrong:
        return Verdict(
            "wrong", f"{len(wrong)} of {len(measurements)} parameters, such as {wrong[0]} instead of {DECAY}"
        )
    return Verdict("right", f"{len(measurements)} parameters")


def ratio_one(who: str) -> Verdict:
    """At ratio 1, and nothing else said, 20 steps of AdamW must give the weights of torch.optim.AdamW, bit for bit."""
    ours, plain = adapted(modules_to_save=["classifier"]), adapted(modules_to_save=["classifier"])
    if who == "PEFT":
        optimizer = peft_optimizer(ours, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=1.0)  # type: ignore[arg-type]
    else:
        optimizer = loraplus.create_optimizer(ours, torch.optim.AdamW, lr=1e-2, lr_ratio=1.0)
    reference = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(0, 64, (4, 8), generator=generator)
        for model, own in ((ours, optimizer), (plain, reference)):
            own.zero_grad()
            model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
            own.step()
    gap = max((a - b).abs().max().item() for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    return Verdict("wrong", f"weights differ by up to {gap:.2g}") if gap else Verdict("right", "the same weights")


def own_ratios(who: str) -> Verdict:
    """kohya's loraplus_unet_lr_ratio 16 and loraplus_text_encoder_lr_ratio 4."""
    if who == "PEFT":
        raise CannotRun("no such option")
    model = kohya()
    ratios = {"^lora_te": 4.0}
    optimizer = loraplus.create_optimizer(model, torch.optim.SGD, lr=LR, lr_ratio=RATIO, lr_ratio_overrides=ratios)
    loraplus.verify(model, optimizer, lr_ratio=RATIO, lr_ratio_overrides=ratios)
    # the text encoder's B is at 4·lr: at 16·lr if multiplied by 4, which is what `compare` looks for
    rates = {
        name: rate * (4 if name.startswith("lora_te") and "lora_up" in name else 1)
        for name, (rate, _) in measured(model, optimizer).items()
    }
    return compare(rates, r"\.lora_up\.weight$")


def split_groups(who: str) -> Verdict:
    """Two groups of the user's own, with rates lr and lr/4 and decays of their own."""
    if who == "PEFT":
        raise CannotRun("no such option")
    model = adapted()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if "layer.0" in name], "lr": LR, "weight_decay": DECAY},
        {"params": [p for name, p in trained if "layer.1" in name], "lr": LR / 4, "weight_decay": 0.0},
    ]
    optimizer = loraplus.create_optimizer(model, torch.optim.SGD, lr=LR, lr_ratio=RATIO, groups=groups)
    measurements = measured(model, optimizer)
    if any(
        not math.isclose(decay, DECAY if "layer.0" in name else 0.0, abs_tol=1e-6)
        for name, (_, decay) in measurements.items()
    ):
        return Verdict("wrong", "a group's weight decay was not kept")
    return compare(
        {name: rate * (1 if "layer.0" in name else 4) for name, (rate, _) in measurements.items()}, r"lora_B"
    )


def one_memory(who: str) -> Verdict:
    """A step of either parameter moves the memory that both are on, so both must have one rate."""
    model = tied()
    optimizer = make(who, model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rates = {}
    for name, parameter in trained.items():  # one at a time, the others have no gradient
        optimizer.zero_grad()
        parameter.data.fill_(1.0)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        rates[name] = 1.0 - parameter.detach().double().mean().item()
    places = {name: parameter.data_ptr() for name, parameter in trained.items()}
    for name, rate in rates.items():
        for other, other_rate in rates.items():
            if places[name] == places[other] and not math.isclose(rate, other_rate, rel_tol=1e-4):
                return Verdict("wrong", f"{name} at {rate / LR:.3g}·lr and {other} at {other_rate / LR:.3g}·lr")
    return compare(rates, "no factor of a linear layer alone")


class ReadsItsDefaults(torch.optim.SGD):
    """Takes groups and steps at the rate that it was built with, as estimators of one rate for all groups do."""

    def step(self, closure=None):  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(parameter.grad, alpha=self.defaults["lr"])


def ignores_rates(who: str) -> Verdict:
    """B moves 16 times as far as A, or the optimizer is refused."""
    model = adapted()
    measurements = measured(model, make(who, model, ReadsItsDefaults))
    return compare({name: rate for name, (rate, _) in measurements.items()}, r"lora_B")


def unused_rate(who: str) -> Verdict:
    """A rate of embeddings, given for a model in which no embedding trains."""
    if who == "PEFT":
        peft_optimizer(
            adapted(),
            torch.optim.SGD,
            lr=LR,
            loraplus_lr_ratio=RATIO,
            loraplus_lr_embedding=1.0,  # type: ignore[arg-type]
        )
    else:
        loraplus.create_optimizer(adapted(), torch.optim.SGD, lr=LR, lr_ratio=RATIO, lr_embedding=1.0)
    return Verdict("wrong", "ignored, silently")


def rate_in_a_tensor(who: str) -> Verdict:
    """Every group's rate is a tensor of its own, so that capturable and compiled optimizers can change each."""
    model, lr = adapted(), torch.tensor(LR)
    if who == "PEFT":
        optimizer = peft_optimizer(model, torch.optim.SGD, lr=lr, loraplus_lr_ratio=RATIO)  # type: ignore[arg-type]
    else:
        optimizer = loraplus.create_optimizer(model, torch.optim.SGD, lr=lr, lr_ratio=RATIO)  # type: ignore[arg-type]
    rates = [group["lr"] for group in optimizer.param_groups if group["params"]]
    if not all(isinstance(rate, torch.Tensor) for rate in rates):
        return Verdict("wrong", "the rates of the groups are numbers")
    if len({rate.data_ptr() for rate in (*rates, lr)}) <= len(rates):
        return Verdict("wrong", "a group shares its tensor with the one that was given")
    return compare({name: rate for name, (rate, _) in measured(model, optimizer).items()}, r"lora_B")


def eight_bit(who: str) -> Verdict:
    """States of an embedding trained in full stay in 32 bits, those of the factors are in 8."""
    cls = library("bitsandbytes.optim").AdamW8bit  # type: ignore[attr-defined]
    model = adapted(modules_to_save=["word_embeddings"])
    optimizer = make(who, model, cls, min_8bit_size=0)
    model(input_ids=torch.arange(32).reshape(4, 8), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    optimizer.step()
    kinds = {name: optimizer.state[p]["state1"].dtype for name, p in model.named_parameters() if p.requires_grad}
    wrong = [
        f"{name} has {kind}"
        for name, kind in kinds.items()
        if kind is not (torch.float32 if "word_embeddings" in name else torch.uint8)
    ]
    return Verdict("wrong", wrong[0]) if wrong else Verdict("right", f"{len(kinds)} parameters")


def resume(who: str) -> Verdict:
    """A Trainer's checkpoint of ratio 16, resumed by a run that asks for ratio 2: at ratio 2, or refused."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": list(range(8)), "labels": index % 2} for index in range(8)]

    def trainer(folder: str, ratio: float, steps: int) -> Trainer:
        args = TrainingArguments(
            folder, max_steps=steps, save_steps=2, learning_rate=1e-3, use_cpu=True, report_to=[], disable_tqdm=True,
            per_device_train_batch_size=2,
        )  # fmt: skip
        model = adapted()
        if who == "PEFT":
            own = peft_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio)  # type: ignore[arg-type]
            return Trainer(model=model, args=args, train_dataset=data, optimizers=(own, None))  # type: ignore[arg-type]
        return loraplus.attach(Trainer(model=model, args=args, train_dataset=data), lr_ratio=ratio)  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory() as folder:
        trainer(folder, 16.0, 2).train()
        second = trainer(folder, 2.0, 4)
        try:
            second.train(resume_from_checkpoint=True)
        except loraplus.ResumeMismatchError as error:
            return Verdict("refused", f"ResumeMismatchError: {error}".replace(folder, "out"))
        names = {id(p): name for name, p in second.model.named_parameters()}
        groups = second.optimizer.param_groups
        rates = {names[id(p)]: group["initial_lr"] for group in groups for p in group["params"]}
    ratio = max(rates.values()) / min(rates.values())
    return Verdict("right" if math.isclose(ratio, 2.0) else "wrong", f"goes on at ratio {ratio:g}, silently")


def in_two_processes(wrapping: str) -> Judge:
    def judge(who: str) -> Verdict:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(HERE / "stacks_processes.py"), wrapping, who, folder]
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
            try:
                _, errors = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its two processes too
                process.communicate()
                raise CannotRun(f"not finished after {SECONDS} s") from None
            result = Path(folder) / "rates.json"
            if process.returncode or not result.is_file():
                raise CannotRun((errors.strip().splitlines() or ["no result"])[-1][:200])
            content = json.loads(result.read_text(encoding="utf-8"))
        if "refused" in content:
            return Verdict("refused", content["refused"])
        mixed = [name for name, values in content["rates"].items() if len(values) != 1]
        if mixed:
            return Verdict("wrong", f"{mixed[0]} has several rates")
        return compare({name: values[0] for name, values in content["rates"].items()}, r"\.lora_B\.")

    return judge


def judged(case: Callable[[str], tuple[str, str]]) -> Judge:
    return lambda who: Verdict(*case(who))


CASES: dict[str, Judge] = {
    **{name: rates_of(case) for name, case in RATES.items()},
    "U-Net and text encoder at ratios of their own": own_ratios,
    "groups of the user's own are split": split_groups,
    "embedding and output layer adapted on one memory": one_memory,
    "an optimizer that takes no notice of its groups' rates": ignores_rates,
    "a rate that reaches no parameter": unused_rate,
    "the rate in a tensor": rate_in_a_tensor,
    "no group is empty": empty_groups,
    "weight_decay= is honoured": weight_decay,
    "ratio 1 is plain AdamW after 20 steps": ratio_one,
    "8-bit AdamW: embeddings in 32 bits": eight_bit,
    "resuming under another ratio": resume,
    **{name: judged(case) for name, case in (LATER | TRAINER | PUBLIC | DEEPSPEED).items()},
    **{name: in_two_processes(wrapping) for wrapping, name in WRAPPINGS.items()},
}


def run(judge: Judge, who: str) -> Verdict:
    try:
        return judge(who)
    except CannotRun as reason:
        return Verdict("cannot run", str(reason))
    except loraplus.LoraPlusError as error:
        return Verdict("refused", f"{type(error).__name__}: {error}")
    except Exception as error:  # a crash of what is judged is an outcome of the case
        return Verdict("wrong", f"{type(error).__name__}: {error}"[:300])


def outcomes(wanted: list[str]) -> Iterator[tuple[str, dict[str, Verdict]]]:
    """(case, verdicts) of the cases whose name has one of the words in it; of all if there is none."""
    known = committed() if wanted == ["--new"] else {}
    for name, judge in CASES.items():
        if name in known:
            yield name, known[name]
            continue
        if wanted and wanted != ["--new"] and not any(part in name for part in wanted):
            continue
        yield name, {who: run(judge, who) for who in WHO}


def versions() -> str:
    """Of the libraries here; of those that are absent, what the page says that their lines were run with."""
    names = (
        "torch transformers peft trl accelerate lightning diffusers lycoris-lora litgpt torchtune bitsandbytes "
        "prodigyopt pytorch-optimizer deepspeed"
    ).split()
    line = re.search(r"^Run with (.*)\.$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    known = dict(part.split(" ") for part in line[1].split(", ")) if line else {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known[name] = importlib.metadata.version(name)
    return ", ".join(f"{name} {known.get(name, 'absent')}" for name in names)


def total(rows: list[tuple[str, dict[str, Verdict]]], who: str) -> str:
    counts = Counter(verdicts[who].kind for _, verdicts in rows)
    return ", ".join(
        f"{counts[kind]} {kind}" for kind in ("right", "refused", "warned", "wrong", "cannot run") if counts[kind]
    )


def markdown(rows: list[tuple[str, dict[str, Verdict]]]) -> str:
    lines = ["| case | PEFT | loraplus | what was seen |", "|---|---|---|---|"]
    for name, verdicts in rows:
        seen = "; ".join(f"{who}: {' '.join(v.detail.split())}" for who, v in verdicts.items() if v.kind != "right")
        lines.append(f"| {name} | {verdicts['PEFT'].kind} | {verdicts['loraplus'].kind} | {seen.replace('|', '/')} |")
    totals = " | ".join(f"**{total(rows, who)}**" for who in WHO)
    reports = ["| public thread, or what was measured | the case that stands for it | PEFT | loraplus |"]
    reports.append("|---|---|---|---|")
    kinds = dict(rows)
    for report, name in REPORTS.items():
        reports.append(f"| {report} | {name} | {kinds[name]['PEFT'].kind} | {kinds[name]['loraplus'].kind} |")
    summary = f"| **{len(rows)} cases** | {totals} | |"
    return "\n".join([*lines, summary, "", f"Run with {versions()}.", "", "## Public reports", "", *reports])


def write(rows: list[tuple[str, dict[str, Verdict]]]) -> None:
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["case", "peft", "loraplus", "peft_detail", "loraplus_detail"])
        for name, verdicts in rows:
            theirs, ours = (verdicts[who] for who in WHO)
            table.writerow([name, theirs.kind, ours.kind, theirs.detail, ours.detail])
    begin, end = "<!-- begin: benchmarks/stacks.py -->", "<!-- end -->"
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(begin)[0], text.split(end)[1]
    PAGE.write_text(f"{before}{begin}\n{markdown(rows)}\n{end}{after}", encoding="utf-8")


def committed() -> dict[str, dict[str, Verdict]]:
    """The results that are written down, by case."""
    with RESULTS.open(encoding="utf-8") as file:
        return {
            row["case"]: {
                "PEFT": Verdict(row["peft"], row["peft_detail"]),
                "loraplus": Verdict(row["loraplus"], row["loraplus_detail"]),
            }
            for row in csv.DictReader(file)
        }


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    print(f"{'case':72}  {'PEFT':10}  loraplus")
    for name, verdicts in outcomes(sys.argv[1:]):
        rows.append((name, verdicts))
        print(f"{name:72}  {verdicts['PEFT'].kind:10}  {verdicts['loraplus'].kind}", flush=True)
        for who, verdict in verdicts.items():
            if verdict.kind != "right":
                print(f"    {who}: {verdict.detail}", flush=True)
    if sys.argv[1:] in ([], ["--new"]):
        write(rows)
    print("\n".join(f"{who}: {total(rows, who)}" for who in WHO))


if __name__ == "__main__":
    main()
