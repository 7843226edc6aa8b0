"""Hostile names of folders, tensors and metadata through a whole analysis: reports, terminal, log, files, browser."""

import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from jaxsub.formats import safetensors
from tests.figures_log import record
from tests.report.test_html import Strict

ROOT = pathlib.Path(__file__).resolve().parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = (
    "<img src=x onerror=alert(1)>.weight", "{{7*7}}${7*7}<%= 7*7 %>", "=1+cmd|' /C calc'!A0", "javascript:x()",
    "</script><script>x()</script>", "../../../tmp/escape", "/etc/passwd", "CON", "leaf", "leaf.weight", "Case", "case",
    "a\u200bb", "x" * 512, "' onmouseover='x()' a='", "&lt;b&gt;", "-->", "]]>",
)  # fmt: skip
FOLDERS = (
    b"\x1b[2J\x1b]0;owned\x07", b"new\nline\rback", "\u202egnp.exe".encode(), b"\xff\xfe broken",
    b"<script>alert(1)<\\script>", b"=1+1", b"$(touch owned)", b"`touch owned`", b"-rf", b"{{7*7}}", b"plain",
)  # fmt: skip
METADATA = {"task": "</title><script>document.title='owned'</script>", "=x": "\x1b[31m", "modelspec.title": "\u202e"}


def build(folder, payload=""):
    rng = np.random.default_rng(0)
    for name in FOLDERS:
        own = os.path.join(os.fsencode(folder), name)
        os.makedirs(own)
        keys = [key + payload for key in KEYS if len(key + payload) <= 512]
        arrays = {key: rng.standard_normal((4, 3)).astype(np.float32) for key in keys}
        safetensors.write(os.path.join(os.fsdecode(own), "model.safetensors"), arrays, METADATA)


def analyze(folder, workdir, cwd):
    cwd.mkdir()
    command = [sys.executable, "-m", "jaxsub", "analyze", f"--collection={folder}", f"--workdir={workdir}", "--draws=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, cwd=cwd, env=environment, timeout=120)


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    build(folder / "models")
    return folder, analyze(folder / "models", folder / "w", folder / "cwd")


@pytest.mark.slow
def test_terminal_and_log_are_plain(analysed):
    folder, done = analysed
    assert done.returncode == 0, done.stderr[-1000:]
    texts = [done.stdout, done.stderr, (folder / "w" / "log.txt").read_bytes()]
    odd = [byte for text in texts for byte in text if not (byte in b"\n\t" or 0x20 <= byte < 0x7F)]
    record("NAMES", "odd bytes of all bytes on terminal and in the log", f"{len(odd)} of {sum(map(len, texts))}")
    assert odd == []


@pytest.mark.slow
def test_files_have_names_of_their_own(analysed):
    folder, _ = analysed
    assert sorted(os.listdir(folder)) == ["cwd", "models", "w"] and os.listdir(folder / "cwd") == []
    statistics = sorted(p.name for p in (folder / "w" / "statistics").iterdir() if p.suffix == ".safetensors")
    assert len(statistics) == len(KEYS)  # keys that differ in case only as well
    assert all(re.fullmatch(r"[a-z0-9_]+\.safetensors", name) for name in statistics)
    assert not list(folder.rglob("owned*")) and not os.path.exists("/tmp/escape")


@pytest.mark.slow
def test_reports_hold_the_names_as_data(analysed):
    folder, _ = analysed
    report = json.loads((folder / "w" / "report.json").read_text(encoding="ascii"))
    assert {layer["name"] for layer in report["layers"]} == {*KEYS}
    assert len(report["collection"]["models"]) == len(FOLDERS)
    page = (folder / "w" / "report.html").read_text(encoding="utf-8")
    parsed = Strict(page)  # elements and attributes of a list, well nested
    assert parsed.titles == ["names/models \u00b7 jaxsub report"] or len(parsed.titles) == 1
    assert len(parsed.scripts) == 1 and "alert" not in parsed.scripts[0]
    assert "<img src=x onerror=alert(1)>" in "".join(parsed.text)
    record("NAMES", "elements of the page outside of the list", "0")


class Listener(http.server.BaseHTTPRequestHandler):
    """Counts every request of the page."""

    requests: list = []

    def do_GET(self):
        self.requests.append(self.path)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def browse(page, tmp_path):
    """(DOM after scripts had their time, title) of a page in headless Chromium."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=3000",
        f"--user-data-dir={tmp_path / 'profile'}", "--no-proxy-server", "--disable-component-update", "--disable-sync",
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120)
    dom = done.stdout.decode("utf-8", "replace")
    assert "</html>" in dom, done.stderr[-500:]
    return dom, re.search("<title>(.*?)</title>", dom)[1]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_runs_none_of_it(tmp_path):
    Listener.requests = []
    server = http.server.HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    attack = f"<script>document.title='owned';fetch('{address}/s')</script>"
    attack += f"<img src={address}/i onerror=document.title='owned'>"
    try:
        build(tmp_path / "models", attack + f'"><link rel=stylesheet href={address}/l><iframe src={address}/f>')
        done = analyze(tmp_path / "models", tmp_path / "w", tmp_path / "cwd")
        assert done.returncode == 0, done.stderr[-1000:]
        page = tmp_path / "w" / "report.html"
        dom, title = browse(page, tmp_path)
        assert Listener.requests == [] and title == re.search("<title>(.*?)</title>", page.read_text())[1]
        assert "owned" not in title and len(re.findall("<script", dom)) == 1
        # The same attack unescaped, without the policy: the browser and the listener would have noticed.
        (tmp_path / "open.html").write_text(f"<html><head><title>t</title></head><body>{attack}</body></html>")
        _, title = browse(tmp_path / "open.html", tmp_path)
        assert title == "owned" and Listener.requests
    finally:
        server.shutdown()
        server.server_close()
    record("NAMES", "scripts run, requests made in Chromium", "0, 0")
