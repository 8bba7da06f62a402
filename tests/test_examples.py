"""The examples run, as somebody would run them."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from dtta_fast import zoo
from dtta_fast.data.corruptions import corrupt

EXAMPLES = Path(__file__).parents[1] / "examples"
PATIENCE = 120  # seconds until a server answers


@pytest.mark.slow
def test_asyncio():
    run = subprocess.run([sys.executable, EXAMPLES / "serve_asyncio.py"], check=True, capture_output=True, text=True)
    right = re.match(r"(\d+) of 24 right", run.stdout)
    assert right is not None, run.stdout
    assert int(right[1]) >= 8  # 9 of the blurred digits are read without adaptation, for which a slow machine's deadline may leave no time


@pytest.mark.slow
def test_asyncio_with_time_enough(capsys):
    example = runpy.run_path(str(EXAMPLES / "serve_asyncio.py"))
    example["main"].__globals__["DEADLINE"] = 60.0
    asyncio.run(example["main"]())
    right = re.match(r"(\d+) of 24 right", capsys.readouterr().out)
    assert right is not None
    assert int(right[1]) >= 18


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def post(port, content):
    """Sends a file as a form's field `image`; the status, and the answer."""
    body = b'--edge\r\nContent-Disposition: form-data; name="image"; filename="digit.png"\r\n\r\n' + content + b"\r\n--edge--\r\n"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/predict", body, {"Content-Type": "multipart/form-data; boundary=edge"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@pytest.fixture
def server(tmp_path):
    port = free_port()
    log = (tmp_path / "log").open("w")
    command = [sys.executable, str(EXAMPLES / "serve_litserve.py"), "--port", str(port)]
    process = subprocess.Popen(
        command, stdout=log, stderr=log, cwd=tmp_path, env={**os.environ, "LIT_SERVER_DISABLE_TELEMETRY": "1"}, start_new_session=True
    )
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.5)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too, which outlive it
        process.wait(timeout=30)
        log.close()


def png(image):
    written = io.BytesIO()
    image.save(written, "PNG")
    return written.getvalue()


@pytest.mark.slow
def test_litserve(server):
    """The same image gets the same answer; what is not an image, or one too large, is refused, and the server lives."""
    digit = png(to_pil_image(corrupt(zoo.example("digits")[0][4:5], "gaussian_blur", 5)[0]))
    status, answer = post(server, digit)
    assert status == 200
    assert set(answer) == {"before", "after", "accepted", "evaluations"}
    assert post(server, b"no image")[0] == 400
    assert post(server, png(Image.new("1", (5000, 5000))))[0] == 413
    assert post(server, digit) == (200, answer)


@pytest.mark.slow
def test_the_notebook_runs_and_its_cells_are_those_that_it_is_written_from():
    notebook = nbformat.read(EXAMPLES / "digits.ipynb", as_version=4)
    cells = runpy.run_path(str(EXAMPLES / "write_notebook.py"))["CELLS"]
    assert [cell.source for cell in notebook.cells] == cells
    kept = [output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"]
    assert re.fullmatch(r"right before \d+%, after \d+%, at \d+ evaluations an image\n", kept[0])
    assert "/" not in "".join(kept)  # no folder of the machine that ran it
    ran = NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shares = next(output.text for cell in ran.cells for output in cell.get("outputs", []) if output.get("name") == "stdout")
    before, after = map(int, re.findall(r"(\d+)%", shares))
    assert after > before + 10
    assert sum("image/png" in output.get("data", {}) for cell in ran.cells for output in cell.get("outputs", [])) == 2
