"""Every example runs from a clean process, ends with the proof of its rates, and is short; the pages quote them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("with-*.py"))
NEEDS = {"trl": "trl", "lightning": "lightning", "diffusers": "diffusers", "accelerate": "accelerate"}


def stack_of(path: Path) -> str:
    return path.stem.removeprefix("with-")


@pytest.mark.parametrize("path", EXAMPLES, ids=stack_of)
def test_an_example_runs_and_prints_its_rates(path, tmp_path):
    if stack_of(path) in NEEDS:
        pytest.importorskip(NEEDS[stack_of(path)], reason=f"{NEEDS[stack_of(path)]} is not installed")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, path], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    a, b = (next(line for line in lines if line.strip().startswith(f"lora_{x}") or f".lora_{x} " in line) for x in "AB")
    assert float(b.split()[2]) == pytest.approx(16 * float(a.split()[2])), done.stdout
    assert len(path.read_text().splitlines()) <= 60


def test_every_stack_has_a_page_and_every_page_an_example():
    pages = {path.stem for path in (ROOT / "docs" / "migrate").glob("*.md")}
    assert pages == {stack_of(path) for path in EXAMPLES} and len(pages) == 7


@pytest.mark.parametrize("path", EXAMPLES, ids=stack_of)
def test_the_page_shows_the_lines_of_the_example(path):
    """The old line commented above the new one, in both; so the page cannot go stale."""
    page = (ROOT / "docs" / "migrate" / f"{stack_of(path)}.md").read_text()
    block = page.split("```python")[1].split("```")[0]
    assert f"examples/{path.name}" in page
    assert any(line.lstrip().startswith("# ") for line in block.splitlines())
    example = path.read_text()
    ours = [line.strip() for line in example.splitlines() if "loraplus." in line and "import" not in line]
    shown = [line for line in ours if line in page]
    assert shown, ours
