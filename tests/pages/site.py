"""The built site, made once for all tests and kept until something that it is made of changes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from pages.blocks import DOCS, OUTSIDE, ROOT

BUILD = DOCS / "_build"
SITE = BUILD / "html"


def _sources() -> str:
    files = [*OUTSIDE, ROOT / "CHANGELOG.md", *(ROOT / "src").rglob("*.py"), *DOCS.rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file() and BUILD not in path.parents):
        digest.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


@cache
def _failure() -> str:
    """Builds the site unless it stands; what was wrong, or nothing. Kept, so a failure is not tried once a test."""
    BUILD.mkdir(exist_ok=True)
    stamp, sources = BUILD / "made-of", _sources()
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the suite may be building it
        if stamp.is_file() and stamp.read_text() == sources:
            return ""
        stamp.unlink(missing_ok=True)
        shutil.rmtree(SITE, ignore_errors=True)
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "sphinx", "-E", "-W", "--keep-going", "-q", "-b", "html", DOCS, SITE]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
        if done.returncode == 0:
            stamp.write_text(sources)
            return ""
        return f"sphinx ended with {done.returncode}: {done.stdout}{done.stderr[-5000:]}"


def built() -> Path:
    """The folder of the site, as `make docs` builds it: a warning is an error."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extra docs)")
    assert not _failure(), _failure()
    return SITE
