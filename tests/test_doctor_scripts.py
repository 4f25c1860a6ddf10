"""`loraplus doctor -- python script.py`: five broken scripts and a right one, and what is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraplus.cli.main import main
from loraplus.diagnosis.script import diagnose_script
from loraplus.errors import InputError

EXAMPLES = Path(__file__).parent.parent / "examples" / "doctor"
EXPECTED = {  # script: (flags, what it says is off, λ found)
    "right": ([], "", 16),
    "flattened": ([], "OneCycleLR did it: its max_lr is not in the ratio of the groups", 1),
    "ignored": ([], "OneRate does not follow the rates of its groups", 1),
    "left_out": ([], "2 of 4 trainable parameters are in no optimizer, so they do not learn: 2.lora_A", 16),
    "swapped": ([], "B learns slower than A in 2 pairs", 0.0625),
    "one_group": (["--lr-ratio", "16"], "λ is 1 and should be 16, as the command line says, in 2 of 2 pairs", 1),
}


@pytest.fixture(scope="module")
def diagnoses():
    """{script: what the doctor says of it}; two run at a time, since most of a run is its imports."""

    def diagnosed(name):
        return diagnose_script(["python", str(EXAMPLES / f"{name}.py"), *EXPECTED[name][0]], steps=3)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(EXPECTED, pool.map(diagnosed, EXPECTED), strict=True))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_broken_script_is_told_from_a_right_one(name, diagnoses):
    _, off, ratio = EXPECTED[name]
    diagnosis = diagnoses[name]
    assert diagnosis.ok == (name == "right")
    assert off in " ".join(diagnosis.problems)
    assert diagnosis.lr_ratio == ratio
    assert diagnosis.verdict.startswith("right: B learns 16 times" if name == "right" else "wrong: ")
    assert [optimizer.steps for optimizer in diagnosis.optimizers] == [3]
    if name == "ignored":
        of_b = next(entry for entry in diagnosis.entries if entry.role == "lora_B")
        assert (of_b.lr, of_b.step_lr) == (0.016, pytest.approx(0.001, rel=1e-3))


HEAD = """
import torch
from small import loss_of, network

import loraplus

def trained(model):
    return [p for p in model.parameters() if p.requires_grad]

def factors(model, part):
    return [p for name, p in model.named_parameters() if part in name]

def train(model, *optimizers, after=lambda: None):
    for _ in range(20):
        loss_of(model).backward()
        for each in optimizers:
            each.step()
        after()

def of_ours(model):
    return torch.optim.AdamW(loraplus.param_groups(model, lr=1e-3, lr_ratio=16))

model = network()
"""
OTHERS = {  # name: (script, λ that it should have, what is off; "" if nothing is)
    "an optimizer that is built again after the one with groups": (
        "optimizer = of_ours(model)\ntrain(model, torch.optim.AdamW(trained(model), lr=1e-3))", None,
        "B learns at A's rate (0.001) in all 2 pairs: this is plain LoRA, though",
    ),
    "an optimizer over another model": (
        "train(network(), of_ours(model))", None,
        "is the model that the loss is computed with the one whose parameters",
    ),
    "a list of lambdas that differ": (
        "o = of_ours(model)\ns = torch.optim.lr_scheduler.LambdaLR(o, [lambda s: 1.0, lambda s: 1 / (1 + s)])\n"
        "train(model, o, after=s.step)", None, "LambdaLR did it: its lambdas differ between the groups",
    ),
    "groups that a loaded state replaces": (
        "plain = torch.optim.AdamW([{'params': factors(model, part)} for part in ('lora_A', 'lora_B')])\n"
        "o = of_ours(model)\no.load_state_dict(plain.state_dict())\ntrain(model, o)", None,
        "λ is 1 and should be 16, as it was built",
    ),
    "one optimizer a factor": (
        "rates = {'lora_A': 1e-3, 'lora_B': 16e-3}\n"
        "train(model, *(torch.optim.SGD(factors(model, part), lr) for part, lr in rates.items()))", 16, "",
    ),
    "steps that a scaler skips": (
        "scaler = torch.amp.GradScaler('cpu', init_scale=2.0**120)\no = of_ours(model)\nfor _ in range(100):\n"
        "    scaler.scale(loss_of(model)).backward()\n    scaler.step(o)\n    scaler.update()\n    o.zero_grad()",
        16, "",
    ),
}  # fmt: skip


def test_scripts_of_other_kinds(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")]))

    def diagnosed(item):
        number, (script, lr_ratio, _) = item
        path = tmp_path / f"{number}.py"
        path.write_text(HEAD + script)
        return diagnose_script(["python", str(path)], steps=3, lr_ratio=lr_ratio)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(diagnosed, enumerate(OTHERS.values())))
    for name, (_, _, off), diagnosis in zip(OTHERS, OTHERS.values(), found, strict=True):
        assert diagnosis.ok == (off == ""), (name, diagnosis)
        assert off in " ".join(diagnosis.problems), (name, diagnosis.problems)


def test_every_example_is_one_of_these():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*EXPECTED, "small"}


SCRIPT = """
import atexit, subprocess, sys
import torch
sys.path.insert(0, {examples!r})
from small import loss_of, network
atexit.register(lambda: open("saved", "w").close())
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, file=open("child", "w"), flush=True)
model = network()
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for step in range(10**9):
    print("step", step)
    loss_of(model).backward()
    optimizer.step()
"""


def test_the_command_prints_json_and_leaves_no_process_and_no_file_behind(tmp_path, monkeypatch, capfd):
    """The script runs in its own folder; what it would save at its end is not saved, what it started is ended."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(SCRIPT.format(examples=str(EXAMPLES)))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--json", "--steps", "2", "--", "train.py"])
    assert stop.value.code == 0
    printed = capfd.readouterr()
    found = json.loads(printed.out)
    assert found["verdict"] == "plain LoRA: B learns at A's rate in all 2 pairs" and found["ok"]
    assert "step 1" in printed.err and "step 2" not in printed.err
    assert {path.name for path in tmp_path.iterdir()} == {"train.py", "child"}
    child = int(Path("child").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            break
        time.sleep(0.05)
    else:
        pytest.fail("a process that the script started is still there")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--", "no-such-program", "--flag"], "no-such-program: no such program"),
        (["--", "python", "nothing.py"], "nothing.py: no such file"),
        (["nothing"], "nothing: no such folder"),
        (["--lr-ratio", "-1", "--", "python", "x.py"], "--lr-ratio must be a finite number > 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *arguments])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_script_that_fails_or_trains_nothing_is_a_mistake(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(InputError, match="ended with exit code 3 before an optimizer of torch took a step"):
        diagnose_script([sys.executable, str(script)], steps=1)


ENDS = """
import os, sys, torch
from small import loss_of, network
rate = float(sys.stdin.readline())
model = network()
a, b = ([p for name, p in model.named_parameters() if part in name] for part in ("lora_A", "lora_B"))
optimizer = torch.optim.SGD([{{"params": a}}, {{"params": b, "lr": 16 * rate}}], lr=rate)
for _ in range(2):
    loss_of(model).backward()
    optimizer.step()
{end}
"""


@pytest.mark.parametrize("end", ["os._exit(3)", "raise SystemExit(3)"])
def test_a_script_that_ends_by_itself_has_shown_the_steps_it_took(end, tmp_path):
    """And it reads what it would read: its own standard input."""
    script = tmp_path / "train.py"
    script.write_text(ENDS.format(end=end))
    command = [sys.executable, "-m", "loraplus", "doctor", "--json", "--", sys.executable, str(script)]
    path = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        command, input="0.001\n", capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["lr_ratio"] == 16 and found["optimizers"][0]["steps"] == 2
    assert "the command ended by itself after 2 steps, with exit code 3" in found["notes"][-1]


BFLOAT16 = """
import torch
from small import loss_of, network
model = network().bfloat16()
a, b = ([p for name, p in model.named_parameters() if part in name] for part in ("lora_A", "lora_B"))
optimizer = torch.optim.AdamW([{"params": a}, {"params": b, "lr": 16e-3}], lr=1e-3)
for _ in range(9):
    model(torch.randn(8, 16).bfloat16()).square().mean().backward()
    optimizer.step()
"""


def test_the_rounding_of_weights_in_16_bits_is_no_other_rate(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(BFLOAT16)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")]))
    found = diagnose_script(["python", str(tmp_path / "train.py")], steps=5, lr_ratio=16)
    assert found.ok and found.lr_ratio == 16


SPAWNS = """
import torch
from small import loss_of, network

def work(rank):
    model = network()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(9):
        loss_of(model).backward()
        optimizer.step()

if __name__ == "__main__":
    torch.multiprocessing.spawn(work, nprocs=1)
    open("saved", "w").close()
"""


def test_what_a_script_does_after_the_processes_that_it_trains_in_is_not_done(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(SPAWNS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")]))
    assert diagnose_script(["python", "train.py"], steps=2).lr_ratio == 1
    assert not Path("saved").exists()


def test_a_module_and_an_own_sitecustomize_run_as_they_would(tmp_path, monkeypatch):
    """`python -m`, and the path's next `sitecustomize`, which ours stands in front of."""
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.there = True")
    (tmp_path / "module.py").write_text(f"there\n{(EXAMPLES / 'right.py').read_text()}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(EXAMPLES), os.environ.get("PYTHONPATH", "")]))
    assert diagnose_script(["python", "-m", "module"], steps=1).lr_ratio == 16


OWN = """
import torch
from small import loss_of, network

class Own:
    def __init__(self, groups):
        self.param_groups = groups

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.sign()
                parameter.grad = None

model = network()
a, b = ([p for name, p in model.named_parameters() if part in name] for part in ("lora_A", "lora_B"))
optimizer = Own([{"params": a, "lr": 1e-3}, {"params": b, "lr": 4e-3}])
for _ in range(9):
    loss_of(model).backward()
    optimizer.step()
"""


def test_an_optimizer_that_is_none_of_torchs_is_watched_too(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")]))
    found = diagnose_script(["python", str(tmp_path / "own.py")], steps=3)
    assert found.ok and found.lr_ratio == 4 and found.optimizers[0].name == "Own"
    assert all(entry.measured for entry in found.entries)


def test_nothing_is_watched_without_the_command():
    """The folder on the path alone, as an earlier run might leave it in a shell, does nothing."""
    import loraplus

    startup = Path(loraplus.__file__).parent / "diagnosis" / "startup"
    code = "import sitecustomize, sys; print(sitecustomize.__file__, len(sys.meta_path))"
    plain = subprocess.run(
        [sys.executable, "-c", "import sys; print(len(sys.meta_path))"], capture_output=True, text=True
    )
    env = {**os.environ, "PYTHONPATH": str(startup)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == [str(startup / "sitecustomize.py"), plain.stdout.strip()]
