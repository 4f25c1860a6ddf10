"""The scoreboard's own cases: loraplus is right or refuses in each, and the page shows what the run wrote."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

# By its path: `stacks` is a package of the tests.
_spec = importlib.util.spec_from_file_location("scoreboard", ROOT / "benchmarks" / "stacks.py")
stacks = sys.modules["scoreboard"] = importlib.util.module_from_spec(_spec)
try:
    _spec.loader.exec_module(stacks)
except ImportError as error:
    pytest.skip(f"a library of the benchmark is not installed: {error}", allow_module_level=True)

# The other wrappings are in tests/stacks/test_wrapping.py; each case starts two processes, for 20 seconds.
WRAPPED = {name for key, name in stacks.WRAPPINGS.items() if key != "FSDP1"}
EXPECTED = {
    "resuming under another ratio": "refused",
    "resuming from a checkpoint of other layers": "refused",
    "two models in one optimizer, resumed under another ratio": "refused",
    "an optimizer that takes no notice of its groups' rates": "refused",
    "a rate that reaches no parameter": "refused",
    "OneCycleLR with one max_lr": "warned",
    "ReduceLROnPlateau with one min_lr": "warned",
    "CosineAnnealingLR with an eta_min": "warned",
    "CyclicLR with one base_lr and max_lr": "warned",
    "an adapter added after the optimizer was built": "warned",
    "an adapter loaded without is_trainable=True": "refused",
    "Accelerate, load_state under another ratio": "refused",
    "resuming under another rate of embeddings": "refused",
    "DeepSpeed's JSON names the optimizer": "refused",
    "DeepSpeed's JSON names WarmupLR": "refused",
    "Prodigy": "refused",
    "D-Adaptation (pytorch-optimizer)": "refused",
    "AdaFactor of pytorch-optimizer": "refused",
    "a rate written into all groups by hand": "warned",
}  # all else: right


@pytest.mark.parametrize("name", [name for name in stacks.CASES if name not in WRAPPED])
@pytest.mark.filterwarnings("ignore")
def test_loraplus_is_right_refuses_or_warns(name):
    verdict = stacks.run(stacks.CASES[name], "loraplus")
    if verdict.kind == "cannot run" and not name.startswith(("DDP", "FSDP")):
        pytest.skip(verdict.detail)
    assert verdict.kind == EXPECTED.get(name, "right"), verdict.detail


def test_the_check_finds_a_wrong_rate_a_wrong_decay_and_an_optimizer_that_leaves_one_out():
    model = stacks.adapted()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = stacks.measured(model, torch.optim.SGD(trained.values(), lr=0.5, weight_decay=0.25))
    assert set(found) == set(trained)
    assert all(rate == pytest.approx(0.5) and decay == pytest.approx(0.25) for rate, decay in found.values())
    one_rate = dict.fromkeys(trained, stacks.LR)
    assert stacks.compare(one_rate, r"lora_B").kind == "wrong"
    right = {name: stacks.LR * (16 if "lora_B" in name else 1) for name in trained}
    assert stacks.compare(right, r"lora_B").kind == "right"
    left_out = stacks.measured(model, torch.optim.SGD(list(trained.values())[1:], lr=0.5))
    assert next(iter(left_out.values())) == (0.0, 0.0)


@pytest.mark.filterwarnings("ignore")
def test_pefts_optimizer_is_measured_as_it_is():
    judged = {
        name: stacks.run(stacks.CASES[name], "PEFT").kind
        for name in (
            "linear layers",
            "DoRA",
            "no group is empty",
            "TRL's DPOTrainer",
            "D-Adaptation (pytorch-optimizer)",
        )
    }
    assert list(judged.values()) == ["right", "wrong", "wrong", "right", "wrong"]


def test_the_page_shows_the_committed_results():
    with (ROOT / "benchmarks" / "results" / "stacks.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == list(stacks.CASES)
    assert "wrong" not in {row["loraplus"] for row in rows}
    page = (ROOT / "docs" / "scoreboard.md").read_text(encoding="utf-8")
    for row in rows:
        assert f"| {row['case']} | {row['peft']} | {row['loraplus']} |" in page
    assert f"**{len(rows)} cases**" in page and len(rows) >= 60


def test_every_public_report_has_a_case():
    page = (ROOT / "docs" / "scoreboard.md").read_text(encoding="utf-8")
    for report, case in stacks.REPORTS.items():
        assert case in stacks.CASES, report
        assert f"| {report} | {case} |" in page
