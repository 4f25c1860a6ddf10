"""A PostgreSQL server of the tests' own: a temporary data folder, a free port on loopback, gone afterwards."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

USER, PASSWORD = "loraplus", "not-to-be-shown"
ACCOUNT = "postgres"  # of the operating system; the server refuses to run as root


def missing(what: str) -> None:
    """Skips on a user's machine, and fails in continuous integration, where nothing may be left out."""
    message = f"{what}; Debian and Ubuntu: apt-get install postgresql"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def binary(name: str) -> str:
    """Path of a program of PostgreSQL's; Debian keeps the server's out of PATH."""
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    found = str(installed[-1]) if installed else shutil.which(name)
    if not found:
        missing(f"PostgreSQL's {name} is not installed")
    return str(found)


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """URL of an empty database on a server that is started for this session."""
    if importlib.util.find_spec("psycopg") is None:
        missing("psycopg is not installed (pip install 'loraplus[postgresql]')")
    initdb, postgres = binary("initdb"), binary("postgres")
    as_account: dict[str, object] = {}
    folder = Path(tempfile.mkdtemp(prefix="loraplus-postgresql-"))
    (folder / "password").write_text(PASSWORD)
    if os.geteuid() == 0:
        try:
            account = pwd.getpwnam(ACCOUNT)
        except KeyError:
            missing(f"there is no account {ACCOUNT!r} to run the server as")
        as_account = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        for path in (folder, folder / "password"):
            os.chown(path, account.pw_uid, account.pw_gid)
    options = {"cwd": folder, "stdout": subprocess.DEVNULL, **as_account}
    try:
        subprocess.run(
            [initdb, "-D", folder / "data", "-U", USER, "--pwfile", folder / "password", "--auth", "scram-sha-256",
             "--encoding", "UTF8", "--locale", "C", "--no-sync"],
            check=True, **options,
        )  # fmt: skip
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [postgres, "-D", folder / "data", "-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-F"],
                stderr=log, **options,
            )  # fmt: skip
        try:
            wait_until_it_answers(server, port, folder / "log")
            yield f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # fast shutdown
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)
            server.kill()
            server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_it_answers(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(host="127.0.0.1", port=port, user=USER, password=PASSWORD, dbname="postgres").close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
