"""Every kind of fault for a few minutes each: `make faults`.

    python benchmarks/faults/every.py --output runs/faults

Longer runs of each script, and what they gave: docs/reliability.md.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BOUNDED = {
    "train killed": ["kill_train.py", "--kills", "40", "--every", "8", "--minutes", "8"],
    "studies killed": ["kill_studies.py", "--minutes", "6"],
    "bad input": ["bad_input.py", "--inputs", "10000"],
    "two at once, journal": ["concurrent_studies.py", "--runs", "100", "--storages", "journal"],
    "two at once, PostgreSQL": ["concurrent_studies.py", "--runs", "100", "--storages", "postgresql"],
    "numbers in flags": ["flag_numbers.py", "--commands", "generate,reproduce"],
    "a large study": ["large_study.py"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/faults"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    lost = 0
    for name, (script, *flags) in BOUNDED.items():
        if "PostgreSQL" in name and not (shutil.which("psql") or list(Path("/usr/lib/postgresql").glob("*"))):
            print(f"{name}: left out, PostgreSQL is not installed", flush=True)
            continue
        result, started = options.output / f"{name.replace(', ', '-').replace(' ', '-')}.json", time.monotonic()
        result.unlink(missing_ok=True)
        with (options.output / f"{result.stem}.log").open("w") as log:
            command = [sys.executable, str(HERE / script), *flags, "--output", str(result)]
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        lost += code != 0
        told = "nothing lost" if code == 0 else f"FAILED, see {log.name}"
        print(f"{name}: {told}, {(time.monotonic() - started) / 60:.1f} min; {result}", flush=True)
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
