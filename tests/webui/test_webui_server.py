"""Installed webuis: what starts and stops them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import webui_server
from webui_server import STALLED, WEBUIS, ServerError, WebuiServer, installed

LAUNCHER = """
import argparse, http.server, json, pathlib
parser = argparse.ArgumentParser()
for flag in ("--api", "--nowebui", "--no-half", "--skip-install", "--always-cpu", "--all-in-fp32", "--no-download-sd-model",
             "--cpu", "--force-fp32", "--skip-prepare-environment", "--skip-torch-cuda-test", "--skip-version-check",
             "--skip-python-version-check"):
    parser.add_argument(flag, action="store_true")
for flag in ("--use-cpu", "--precision", "--data-dir", "--server-name", "--port"):
    parser.add_argument(flag)
options = parser.parse_args()
extensions = sorted(p.name for p in pathlib.Path(options.data_dir, "extensions").iterdir())

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({**vars(options), "extensions": extensions}).encode())

    def do_POST(self):
        self.send_response(422)
        self.end_headers()
        self.wfile.write(b"no such script")

http.server.HTTPServer((options.server_name, int(options.port)), Handler).serve_forever()
"""


@pytest.mark.parametrize("kind", WEBUIS)
def test_a_webui_is_started_on_loopback_with_the_pack_and_stopped(tmp_path, kind):
    folder, work = tmp_path / "webui", tmp_path / "work"
    folder.mkdir()
    (folder / "launch.py").write_text(LAUNCHER)
    with WebuiServer(kind, folder, work) as server:
        flags = server.get("sdapi/v1/cmd-flags")
        assert flags["api"] and flags["nowebui"] and flags["server_name"] == "127.0.0.1"
        assert flags["extensions"] == ["forget-me-not"]
        with pytest.raises(ServerError, match="422: no such script"):
            server.post("sdapi/v1/txt2img", prompt="a cat")
    assert server.process.poll() is not None


def test_a_webui_that_does_not_start_says_why(tmp_path):
    (tmp_path / "launch.py").write_text("raise SystemExit('no torch here')")
    with (
        pytest.raises(ServerError, match="stopped while starting:\nno torch here"),
        WebuiServer("a1111", tmp_path, tmp_path),
    ):
        pass


def test_where_none_is_installed_the_tests_say_what_to_set(monkeypatch, tmp_path):
    for kind, webui in WEBUIS.items():
        monkeypatch.setenv(webui.variable, str(tmp_path))
        with pytest.raises(pytest.skip.Exception, match=f"{webui.variable}.*launch.py"):
            installed(kind)


def test_a_webui_that_says_something_is_waited_for_and_a_silent_one_is_not(tmp_path, monkeypatch):
    """On a clock of its own: the log grows for an hour, then no more."""
    (tmp_path / "launch.py").write_text("import time\ntime.sleep(600)")
    server, clock = WebuiServer("a1111", tmp_path, tmp_path), SimpleNamespace(now=0.0)

    def sleep(seconds):
        clock.now += 60
        if clock.now <= 3600:
            with open(server.log, "a") as log:
                log.write(f"loading, minute {clock.now / 60:.0f}\n")

    monkeypatch.setattr(webui_server, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    with pytest.raises(ServerError, match=r"(?s)said nothing for 300 s.*minute 60"), server:
        pass
    assert 3600 < clock.now <= 3600 + STALLED + 60
    assert server.process.poll() is not None
