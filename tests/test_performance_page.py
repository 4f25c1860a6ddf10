"""docs/performance.md shows the committed results, and nothing where there are none."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from loraplus.bench.asked import saved
from loraplus.bench.tables import markdown

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from gpu_speed_results import table

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- begin: (.+?) --table (\S+) -->\n(.*?)\n<!-- end -->", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize(("command", "path", "shown"), BLOCKS, ids=[path for _, path, _ in BLOCKS])
def test_a_table_is_what_its_command_prints(command, path, shown):
    if not (ROOT / path).exists():
        assert shown == "Not measured yet."
        return
    if command == "loraplus bench":
        assert shown == markdown(saved(str(ROOT / path))).strip()
    else:
        assert shown == table(json.loads((ROOT / path).read_text(encoding="utf-8"))).strip()


def test_every_result_is_on_the_page():
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks" / "results" / "speed").glob("*.json")}
    assert there <= {path for _, path, _ in BLOCKS} and len(BLOCKS) == 5
