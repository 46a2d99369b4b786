"""``octavo serve`` as a process: it says where it listens, answers, and ends quietly."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from octavo.cli import main


def test_a_server_answers_until_it_is_ended(tiny_llama: Path) -> None:
    command = [sys.executable, "-m", "octavo.cli", "serve", str(tiny_llama), "--port", "0", "--context", "64"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "listens on http://127.0.0.1:" in line and "64 tokens of context" in line, line
        url = line.split(" listens on ")[1].split(" ")[0]
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "temperature": 0}
        asked = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode())
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] <= 3
        # Not an interrupt, which tests in the background would pass on as ignored.
        process.terminate()
        rest, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors and not rest
    finally:
        process.kill()
        process.wait()


def test_an_address_that_is_taken_is_an_error(tiny_llama: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["serve", str(tiny_llama), "--port", str(other.getsockname()[1]), "--quiet"]) == 5
