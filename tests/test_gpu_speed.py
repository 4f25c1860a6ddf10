"""benchmarks/gpu_speed.py at its toy size, with a stand-in for `speed_up` that does nothing or fails."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_speed

ARGUMENTS = "--toy --no-compile --rounds 2 --steps 1 --only casts"


def measured(monkeypatch, tmp_path, speed_up, arguments=ARGUMENTS):
    monkeypatch.setattr("loraplus.speed.LEVERS", ("adapters", "recompute"))
    monkeypatch.setattr("loraplus.speed.speed_up", speed_up)
    output = tmp_path / "speed.json"
    monkeypatch.setattr(sys, "argv", ["gpu_speed.py", *arguments.split(), "--output", str(output)])
    gpu_speed.main()
    return json.loads(output.read_text())


def nothing_done(model, levers=None):
    return types.SimpleNamespace(replaced=[], left=[f"{lever}: a stand-in" for lever in levers])


def test_every_arm_is_timed_and_its_gradients_are_those_of_float32_to_bf16s_rounding(monkeypatch, tmp_path, capsys):
    found = measured(monkeypatch, tmp_path, nothing_done, f"{ARGUMENTS} --profile")
    assert not found["errors"]
    assert {"PEFT", "ours", "PEFT, no input casts"} <= set(found["phases"]["eager"])
    for name, arm in found["arms"].items():
        assert 1e-4 < arm["gradient_error"] < 3e-2
        assert len(found["phases"]["eager"][name]["rounds"]) == 2
        assert arm["kernels"][0]["name"] == "all" and arm["kernels"][1]["ms"] > 0
    ours = found["conclusions"]["eager"]["ours"]
    assert ours["against"].startswith("PEFT") and ours["times_faster"]["ratio"] > 0
    assert "| ours |" in capsys.readouterr().out


def test_an_arm_that_fails_leaves_its_error_and_the_others_their_times(monkeypatch, tmp_path):
    def broken(model, levers=None):
        raise RuntimeError("no such layer")

    found = measured(monkeypatch, tmp_path, broken)
    assert found["errors"]["ours"] == "RuntimeError: no such layer"
    assert "PEFT" in found["phases"]["eager"] and "ours" not in found["phases"]["eager"]


def test_a_speed_up_that_changes_the_gradients_is_seen(monkeypatch, tmp_path):
    def wrong(model, levers=None):
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                weight.register_hook(lambda grad: grad * 1.3)
        return nothing_done(model, levers)

    found = measured(monkeypatch, tmp_path, wrong)
    assert found["arms"]["ours"]["gradient_error"] > 3 * found["arms"]["PEFT"]["gradient_error"]


def test_an_arm_that_takes_too_long_is_ended(capsys):
    with pytest.raises(gpu_speed.OutOfTimeError), gpu_speed.within(0.2):
        while True:
            pass
