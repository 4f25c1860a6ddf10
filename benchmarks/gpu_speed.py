"""One training step on a GPU: PEFT with transformers' Trainer in several configurations, beside `loraplus.speed_up`.

    python benchmarks/gpu_speed.py --output gpu.json            # about 1 B parameters, bf16, 4 x 1,024 tokens
    python benchmarks/gpu_speed.py --toy --output toy.json      # the same at a toy size, on the CPU
    python benchmarks/gpu_speed.py --profile --output gpu.json  # and the costliest kernels of a step of each arm

The base weights are random and bf16, LoRA has rank 16 on all linear layers, nothing is dropped out, attention is sdpa,
the optimizer is fused AdamW. A step is `Trainer.training_step` on a model that Accelerate prepared, clipping, the
optimizer's step and zero_grad; the rest of Trainer's loop is left out for every arm. Arms take turns, and each step is
timed to the end of its last kernel. Memory is the peak of a step over the idle model: activations, gradients and the
optimizer's states. Every arm's gradients are held against those of the same step in float32.

Each arm stands alone: one that fails leaves its error in the results. They are written after every arm and round, so a
process that is killed loses nothing. Needs torch, transformers, accelerate and peft.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments, set_seed

from gpu_speed_results import conclude, table  # isort: skip

from loraplus.bench.machine import machine
from loraplus.bench.profiling import costliest
from loraplus.bench.timing import spread, take_turns

SHAPES = {
    "tinyllama-1.1b": {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "toy": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A configuration of the same training step."""

    name: str
    levers: tuple[str, ...] | None = None  # of speed_up, + and −; None: plain PEFT; (): the usual ones
    casts: bool = True  # whether PEFT casts the input of an adapted layer to the factors' dtype
    float32_factors: bool = True  # False: the factors, their gradients and Adam's states are bf16, without autocast
    checkpointing: bool = False
    compiled: bool = False

    @property
    def ours(self) -> bool:
        return self.levers is not None

    @property
    def reference(self) -> bool:
        """Whether ours is held against it: PEFT, training the same numbers."""
        return not self.ours and self.float32_factors


EAGER = (
    Arm("PEFT"),
    Arm("ours", levers=()),
    Arm("PEFT, no input casts", casts=False),
    Arm("ours, graphs", levers=("+graphs",)),
    Arm("PEFT, no input casts, checkpointing", casts=False, checkpointing=True),
    Arm("PEFT, bf16 factors (other numbers)", float32_factors=False),
    Arm("ours, recompute left out", levers=("-recompute",)),
    Arm("ours, checkpointing", levers=(), checkpointing=True),
)
COMPILED = (
    Arm("PEFT, no input casts, compiled", casts=False, compiled=True),
    Arm("ours, compiled", levers=(), compiled=True),
    Arm("PEFT, compiled", compiled=True),
)


class OutOfTimeError(BaseException):
    """An arm took longer to make than it may; no library between here and there catches this one."""


@dataclass
class Bench:
    """What all arms share, and what has been found."""

    options: argparse.Namespace
    device: torch.device
    config: LlamaConfig
    batch: dict[str, torch.Tensor]
    results: dict[str, Any]
    reference: dict[str, torch.Tensor] = field(default_factory=dict)
    turns: dict[str, Callable[[], float]] = field(default_factory=dict)
    models: dict[str, torch.nn.Module] = field(default_factory=dict)

    def write(self) -> None:
        if self.options.output:
            path = Path(self.options.output)
            half = path.with_name(f"{path.name}.part")
            half.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
            half.replace(path)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def allocated(self) -> int:
        self.wait()
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0


def adapted(bench: Bench, arm: Arm, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """The base model and its adapter: the same weights whenever it is made. B is not at zero, so A has a gradient."""
    set_seed(0)
    with bench.device:
        base = AutoModelForCausalLM.from_config(bench.config, dtype=torch.bfloat16, attn_implementation="sdpa")
    base = base.to(dtype)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora, autocast_adapter_dtype=arm.float32_factors).to(bench.device)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:  # bf16 holds these values, so that arms of either dtype start from the same
                values = torch.randn(weight.shape, generator=draw) / (
                    50 if "lora_B" in name else weight.shape[1] ** 0.5
                )
                weight.copy_(values.bfloat16())
    if not arm.casts:
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False  # as peft.helpers.disable_input_dtype_casting does for a while
    if arm.ours:
        from loraplus.speed import LEVERS, speed_up

        changed = arm.levers or ()
        levers = [lever for lever in LEVERS if f"-{lever}" not in changed]
        report = speed_up(model, levers=[*levers, *(lever[1:] for lever in changed if lever.startswith("+"))])
        parts = {name: str(getattr(report, name, None))[:1500] for name in ("replaced", "left")}
        bench.results["arms"][arm.name] |= parts
    if arm.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def trainer_step(bench: Bench, arm: Arm, model: torch.nn.Module) -> Callable[..., None]:
    """A step as Trainer takes it. Called with update=False, it leaves the gradients and takes no step."""
    args = TrainingArguments(
        output_dir=tempfile.gettempdir(), bf16=True, optim="adamw_torch_fused", learning_rate=1e-5, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=bench.device.type == "cpu",
    )  # fmt: skip
    trainer = Trainer(model=model, args=args)
    optimizer = trainer.create_optimizer()
    running: Any = trainer.accelerator.prepare(model) if arm.float32_factors else model  # enters autocast
    if arm.compiled:
        running = torch.compile(running)  # what TrainingArguments(torch_compile=True) has Accelerate do
    trainable = [p for p in model.parameters() if p.requires_grad]
    trainer.current_gradient_accumulation_steps = 1  # what Trainer's loop sets

    def step(update: bool = True) -> None:
        batches, items = trainer.get_batch_samples(iter([bench.batch]), 1, bench.device)
        trainer.training_step(running, batches[0], items)
        if update:
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.detach().float().cpu() for n, p in model.named_parameters() if p.grad is not None}


def distance(measured: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """‖measured − reference‖ / ‖reference‖ over all gradients together."""
    if set(measured) != set(reference):
        raise RuntimeError(f"gradients of other parameters: {sorted(set(measured) ^ set(reference))[:4]}")
    off = sum(((measured[n].double() - reference[n].double()) ** 2).sum() for n in reference)
    return float((off / sum((g.double() ** 2).sum() for g in reference.values())) ** 0.5)


def float32_reference(bench: Bench) -> None:
    """The gradients of the step in float32, from the same values; nothing of it stays on the device."""
    model = adapted(bench, Arm("float32"), torch.float32)
    model(**bench.batch).loss.backward()
    bench.reference = gradients(model)


def prepare(bench: Bench, arm: Arm) -> None:
    """Makes an arm, measures its gradients and its memory, and leaves its turn in `bench.turns`."""
    result = bench.results["arms"][arm.name] = {"ours": arm.ours, "reference": arm.reference}
    before, started = bench.allocated(), time.perf_counter()
    model = adapted(bench, arm)
    idle = bench.allocated()
    step = trainer_step(bench, arm, model)
    graphed = "+graphs" in (arm.levers or ())
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(5 if graphed else 0):  # to what is replayed
        step(update=False)
        model.zero_grad()
    step(update=False)
    bench.wait()
    result["first_step_seconds"] = round(time.perf_counter() - started, 2)
    if bench.reference:
        result["gradient_error"] = distance(gradients(model), bench.reference)
    model.zero_grad()
    for _ in range(2):
        step()
    result["idle_mib"] = round((idle - before) / 2**20, 1)
    if bench.device.type == "cuda":
        bench.wait()
        if not graphed:  # of graphs, what capturing them took: a replay's own memory is not counted
            torch.cuda.reset_peak_memory_stats()
        step()
        bench.wait()
        result["peak_over_idle_mib"] = round((torch.cuda.max_memory_allocated() - idle) / 2**20, 1)

    def turn() -> float:
        times = []
        for _ in range(bench.options.steps):
            bench.wait()
            start = time.perf_counter()
            step()
            bench.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    bench.turns[arm.name], bench.models[arm.name] = turn, model
    if bench.options.profile:
        result["kernels"] = costliest(step, bench.device)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends what runs inside when its time is over."""

    def over(*_: Any) -> None:
        raise OutOfTimeError(f"not ready after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def attempt(bench: Bench, what: str, work: Callable[[], None], seconds: float) -> None:
    """Does a piece of work; what goes wrong is told and kept, and the rest goes on."""
    start = time.perf_counter()
    try:
        with within(seconds):
            work()
        print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)
    except (Exception, OutOfTimeError) as error:
        bench.results["errors"][what] = f"{type(error).__name__}: {error}"[:600]
        bench.turns.pop(what, None)
        bench.models.pop(what, None)
        print(f"{what}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
        if bench.options.traceback:
            traceback.print_exc()
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    bench.write()


def compare(bench: Bench, phase: str, names: list[str], seconds: float) -> None:
    """Arms in turns. What has been timed is in the results after every round."""
    times: dict[str, list[float]] = {name: [] for name in names}

    def kept(name: str) -> Callable[[], float]:
        def turn() -> float:
            times[name].append(bench.turns[name]())
            return times[name][-1]

        return turn

    def told(_: int) -> None:
        bench.results["phases"][phase] = {
            name: {**spread(values).to_dict(), "rounds": values} for name, values in times.items()
        }
        conclude(bench.results)
        bench.write()

    take_turns({name: kept(name) for name in names}, seconds, bench.options.rounds, told=told)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="where the results go, as JSON")
    parser.add_argument("--toy", action="store_true", help="a toy size on the CPU")
    parser.add_argument("--shape", choices=list(SHAPES)[:-1], default="tinyllama-1.1b")
    parser.add_argument("--masked", type=float, default=0.0, help="the share of labels that are not learnt")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=210.0, help="for all together")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled arms out")
    parser.add_argument("--ablation", action="store_true", help="ours with each lever left out, in place of compiling")
    parser.add_argument("--only", help="arms whose name has this in it, beside `PEFT` and `ours`")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--table", metavar="JSON", help="print the table of a file of results, and measure nothing")
    parser.add_argument("--traceback", action="store_true", help="of an arm that fails")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.table:
        return print(table(json.loads(Path(options.table).read_text(encoding="utf-8"))))
    options.no_compile |= options.ablation
    started = time.perf_counter()
    shape = "toy" if options.toy else options.shape
    device = torch.device("cpu" if options.toy else "cuda")
    rows, tokens = (2, 32) if options.toy else (4, 1024)
    config = LlamaConfig(**SHAPES[shape])
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, config.vocab_size, (rows, tokens), generator=draw)
    labels = torch.where(torch.rand(ids.shape, generator=draw) < options.masked, -100, ids)
    batch = {"input_ids": ids.to(device), "labels": labels.to(device)}
    masked = f", {100 * options.masked:.0f}% of labels masked" if options.masked else ""
    settings = f"{shape}, bf16, r = 16 on all linear layers, {rows}×{tokens} tokens{masked}"
    results = {"settings": settings, "machine": machine(), "arms": {}, "phases": {}, "errors": {}}
    bench = Bench(options, device, config, batch, results)

    def left(share: float) -> float:
        return share * (options.seconds - (time.perf_counter() - started))

    attempt(bench, "float32 gradients", lambda: float32_reference(bench), left(0.3))
    for arm in chosen(EAGER, options):
        attempt(bench, arm.name, lambda arm=arm: prepare(bench, arm), left(0.3))
    names = list(bench.turns)
    if names:
        share = left(0.8 if options.no_compile else 0.3)
        attempt(bench, "eager, in turns", lambda: compare(bench, "eager", names, share), left(0.9))
    if not options.no_compile:
        keep = {name for name in names if name.startswith("ours")} | {fastest(bench)}
        for name in set(names) - keep:  # makes room
            del bench.turns[name], bench.models[name]
        for arm in chosen(COMPILED, options):
            attempt(bench, arm.name, lambda arm=arm: prepare(bench, arm), left(0.5))
        names = list(bench.turns)
        attempt(bench, "all, in turns", lambda: compare(bench, "with compiled", names, left(0.8)), left(0.95))
    results["seconds"] = round(time.perf_counter() - started, 1)
    bench.write()
    return print(table(results))


def chosen(arms: tuple[Arm, ...], options: argparse.Namespace) -> list[Arm]:
    """The arms that the options ask for."""
    if options.ablation:
        from loraplus.speed import LEVERS

        arms = (*arms[:3], *(Arm(f"ours, {lever} left out", levers=(f"-{lever}",)) for lever in LEVERS))
    return [arm for arm in arms if arm.name in ("PEFT", "ours") or not options.only or options.only in arm.name]


def fastest(bench: Bench) -> str:
    """The fastest of PEFT's configurations so far."""
    timed = bench.results["phases"].get("eager", {})
    references = [name for name in timed if bench.results["arms"][name]["reference"]]
    return min(references, key=lambda name: timed[name]["median"], default="")


if __name__ == "__main__":
    main()
