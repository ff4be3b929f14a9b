"""The live page is served to this machine alone, and only when something has changed."""

import http.client
import signal
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import made_run
import pytest

from headwater.report.watch import serving, stamp


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[str, int, Path]]:
    root = made_run.make(tmp_path / "run", at_work=True)
    with serving(root) as url:
        place = urllib.parse.urlsplit(url)
        assert place.hostname == "127.0.0.1" and place.port
        yield place.hostname, place.port, root


def ask(
    live: tuple[str, int, Path], path: str = "/", method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(live[0], live[1], timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
    connection.close()
    return found


def test_page_and_headers(live: tuple[str, int, Path]):
    status, headers, body = ask(live)
    assert status == 200 and 'data-live="yes"' in body and "<strong>36</strong> of 42 nodes done" in body
    assert headers["content-type"] == "text/html; charset=utf-8" and headers["x-content-type-options"] == "nosniff"
    assert "connect-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert ask(live, method="HEAD")[::2] == (200, "")
    assert ask(live, "/nodes/")[0] == ask(live, "/../recipe.toml")[0] == 404
    assert ask(live, method="POST")[0] == 501


def test_unchanged_is_304_and_a_change_is_a_new_page(live: tuple[str, int, Path]):
    for _ in range(2):  # the tag also changes with the minute
        tag = ask(live)[1]["etag"]
        status, headers, body = ask(live, If_None_Match=tag)
        if status == 304:
            break
    assert (status, headers["etag"], body) == (304, tag, "")
    with (live[2] / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "kind": "failed", "key": null, "error": ""}\n')
    status, headers, _ = ask(live, If_None_Match=tag)
    assert status == 200 and headers["etag"] != tag


@pytest.mark.parametrize(
    "host", ["evil.example:{port}", "evil.example", "127.0.0.1", "127.0.0.1:1", "", "[::1]:{port}"]
)
def test_other_hosts_are_refused(live: tuple[str, int, Path], host: str):
    status, _, body = ask(live, Host=host.format(port=live[1]))
    assert status == 403 and "nodes done" not in body
    assert ask(live, Host=f"localhost:{live[1]}")[0] == 200


def test_it_listens_on_this_machine_only(live: tuple[str, int, Path]):
    for address in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}:
        if not str(address).startswith("127."):
            with pytest.raises(OSError):
                socket.create_connection((str(address), live[1]), timeout=2)


def test_a_run_that_goes_away_is_an_error_not_a_crash(live: tuple[str, int, Path]):
    live[2].rename(live[2].with_name("moved"))
    assert ask(live)[0] == 503
    live[2].with_name("moved").rename(live[2])
    assert ask(live)[0] == 200


def test_bad_places_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is no directory"), serving(tmp_path / "absent"):
        pass
    with pytest.raises(ValueError, match="holds no run"), serving(tmp_path):
        pass
    root = made_run.make(tmp_path)
    with serving(root) as url:
        port = urllib.parse.urlsplit(url).port
        assert port
        with pytest.raises(ValueError, match=f"port {port} cannot be used"), serving(root, port):
            pass
    with pytest.raises(ValueError, match="port 99999 cannot be used"), serving(root, 99999):
        pass


def test_the_stamp_is_of_the_run_not_of_its_report(tmp_path: Path):
    root = made_run.make(tmp_path)
    before = stamp(root)
    (root / "report.html").write_text("x")
    assert stamp(root) == before
    (root / "results.json").write_text("{}")
    assert stamp(root) != before


def test_ctrl_c_ends_the_command(tmp_path: Path):
    root = made_run.make(tmp_path)
    command = [sys.executable, "-c", "from headwater.cli import app; app()", "watch", str(root), "--no-browser"]
    # A job that a shell put into the background ignores the signal, and so would its children.
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=listen)
    assert process.stdout
    assert "at http://127.0.0.1:" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    assert process.stderr and process.stderr.read() == ""
