"""`loraplus watch`: pages of one folder, to this machine alone."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loraplus.errors import InputError
from loraplus.report.live import LivePage, study_page
from loraplus.report.serve import server
from loraplus.study.runner import Event


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "report.html").write_text("<h1>found</h1>")
    (folder / "summary.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / ".hidden.html").write_text("hidden")
    (tmp_path / "secret.html").write_text("secret")
    (tmp_path / "runs-other").mkdir()
    (tmp_path / "runs-other" / "report.html").write_text("secret")
    (folder / "link.html").symlink_to(tmp_path / "secret.html")
    (folder / "out").symlink_to(tmp_path / "runs-other")
    return folder


@pytest.fixture
def ask(root: Path):
    """(status, headers, text) of a request to a server of the folder; the path is sent as it is."""
    with server(root, 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        port = serving.server_address[1]

        def call(path: str = "/", method: str = "GET", **headers: str):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.putrequest(method, path, skip_host=True)
            for name, value in {"Host": f"127.0.0.1:{port}", **headers}.items():
                connection.putheader(name.replace("_", "-"), value.replace("PORT", str(port)))
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()

        yield call
        serving.shutdown()


def test_the_one_report_is_the_first_page_and_always_fresh(root, ask):
    status, headers, text = ask()
    assert (status, text, headers["Cache-Control"]) == (200, "<h1>found</h1>", "no-store")
    (root / "report.html").write_text("<h1>more</h1>")
    assert ask("/report.html?x=1")[2] == ask("/", Host="localhost:PORT")[2] == "<h1>more</h1>"
    assert ask("/summary.json")[0] == 200 and ask("/", "HEAD")[2] == ""


def test_several_reports_are_listed_and_what_they_are_called_is_escaped(root, ask):
    inner = root / "<img src=x> b"
    inner.mkdir()
    (inner / "index.html").write_text("inner")
    _, _, text = ask()
    assert "<img" not in text and "&lt;img src=x&gt; b/index.html" in text and "secret" not in text
    assert ask("/%3Cimg%20src%3Dx%3E%20b/index.html")[2] == "inner"


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.html", "/..%2fsecret.html", "/%2e%2e/secret.html", "/a/../../secret.html", "/..\\secret.html",
        "//etc/passwd", "/../runs-other/report.html", "/out/report.html", "/link.html", "/.hidden.html",
        "/adapter_model.safetensors", "/report.html/", "/report.html%00", "/nothing.html", "http://x/secret.html",
        "report.html", "/%ff.html", "/" + "a" * 5000 + ".html", "/./report.html", "/C:/report.html",
    ],
)  # fmt: skip
def test_nothing_but_pages_of_the_folder_is_served(ask, path):
    status, _, text = ask(path)
    assert status == 404 and "secret" not in text and "weights" not in text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:PORT", "127.0.0.1", "127.0.0.1:1", "0.0.0.0:PORT", ""])
def test_a_request_that_names_another_host_is_refused(ask, host):
    status, _, text = ask(Host=host)
    assert status == 403 and "found" not in text


def test_another_site_reads_nothing(ask):
    assert ask(Sec_Fetch_Site="cross-site")[0] == 403
    _, headers, _ = ask()
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and "Access-Control-Allow-Origin" not in headers
    assert headers["X-Frame-Options"] == "DENY" and headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_sent(ask, method):
    assert ask("/", method)[0] == 501


def test_it_listens_to_this_machine_alone_and_says_what_cannot_be_used(root):
    with server(root, 0) as serving:
        assert serving.server_address[0] == "127.0.0.1"
        with pytest.raises(InputError, match="cannot be used"):
            server(root, serving.server_address[1])
    for folder, port in ((root / "nothing", 0), (root, 70000), (root / "report.html", 0)):
        with pytest.raises(InputError):
            server(folder, port)


def test_the_command_says_its_address_in_one_line_and_ctrl_c_ends_it_in_one(root):
    process = subprocess.Popen(
        [sys.executable, "-m", "loraplus", "watch", str(root), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "COLUMNS": "40"},
    )  # fmt: skip
    assert process.stdout
    line = process.stdout.readline()
    port = int(line.split("127.0.0.1:")[1].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/")
    assert connection.getresponse().read() == b"<h1>found</h1>"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "watching has ended\n")


def test_while_a_comparison_runs_its_page_is_written_and_loads_itself_again(tmp_path):
    from study.test_summary import study

    records, seen = study(0.9), []
    path = tmp_path / "report.html"
    settings = {"data": "<b>d.csv", "model": "m", "task": "classification"}
    page = LivePage(path, study_page("compare", settings), seen.append)
    finished = {record.trial.key: record for record in records[:3]}
    events = [Event("planned", 0, 20), Event("finished", 3, 20, trial=records[2].trial, record=records[2])]
    for event in events:
        page(event)
    assert seen == events and "<h1>0 of 20 runs done</h1>" in path.read_text()  # not again within two seconds
    page._file._written = -1e9
    page(Event("step", 3, 20, records=finished))
    text = path.read_text()
    assert "<h1>3 of 20 runs done</h1>" in text and '<meta http-equiv="refresh" content="5">' in text
    assert text.count("<tr><td>") > 3 and "&lt;b&gt;d.csv" in text and "<b>d" not in text
