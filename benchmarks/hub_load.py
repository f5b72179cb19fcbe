"""Thirty learners come into the room at once: each starts a server on one JupyterHub, opens an exercise and runs its first check.

    python -m benchmarks.hub_load                      # thirty, saves the result "hub_load"
    python -m benchmarks.hub_load --learners 5 --only  # fewer; saves to a temporary folder
    python -m benchmarks.hub_load --smoke              # one, saves to a temporary folder

The hub is that of classroom/jupyterhub_config.py, in a temporary folder; jupyterhub has to be installed and configurable-http-proxy on the
path. A learner is a client that asks for a server, waits for it, reads exercises/02_lora.ipynb, starts a kernel, and runs there the setup
cell, the worked answer of the first exercise, and its check. Seconds count from the moment at which all of them begin. Memory is the
proportional share (PSS) of a learner's server and kernel when the check has passed, so pages that processes share count once.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from benchmarks.cli import message, options
from course import ROOT
from course.lab import recorded
from course.notebooks import marks, read

LEARNERS = 30
PATIENCE = 600.0  # seconds, for each learner
START_SECONDS = 90.0  # for the hub itself
NOTEBOOK = "02_lora"

CONFIGURATION = """
load_subconfig({path!r})
c.JupyterHub.services = [{{"name": "load", "api_token": {token!r}}}]
c.JupyterHub.load_roles = [{{"name": "load", "services": ["load"], "scopes": ["admin:users", "admin:servers", "access:servers"]}}]
"""


def cells() -> list[str]:
    """The first cells of the worked solution, to the first check: what a learner who is right runs."""
    found = []
    for cell in read(ROOT / "solutions" / f"{NOTEBOOK}.ipynb").cells:
        if cell.cell_type == "code":
            found.append(cell.source)
            if marks(cell).get("grade"):
                return found
    raise ValueError(f"{NOTEBOOK} has no check")


class Hub:
    """A running hub; a context manager.

    Attributes:
        root: the course that it serves.
        address: of its first page.
        password, instructor: what a learner and the instructor log in with.
    """

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self.folder, self.root, self.token = folder, root, secrets.token_hex(32)
        self.password, self.instructor = secrets.token_hex(8), secrets.token_hex(32)
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            for each in (one, two, three):
                each.bind(("127.0.0.1", 0))
            self.port, self.inner, self.api = (each.getsockname()[1] for each in (one, two, three))
        self.address = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Hub":
        path = self.folder / "config.py"
        path.write_text(CONFIGURATION.format(path=str(self.root / "classroom" / "jupyterhub_config.py"), token=self.token))
        secret = {"COURSE_HUB_PASSWORD": self.password, "COURSE_HUB_INSTRUCTOR": self.instructor}
        command = [sys.executable, "-m", "jupyterhub", "-f", str(path), "--ip", "127.0.0.1", "--port", str(self.port)]
        command += [f"--JupyterHub.hub_port={self.inner}", f"--ConfigurableHTTPProxy.api_url=http://127.0.0.1:{self.api}"]
        self.log = (self.folder / "log").open("w")
        environment = os.environ | secret | {"COURSE_HUB_FOLDER": str(self.folder / "hub"), "PYTHONPATH": str(self.root)}
        self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=self.log, stderr=self.log, start_new_session=True)
        return self

    def __exit__(self, *_) -> None:
        started = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for process in [*started, psutil.Process(self.process.pid)] if self.process.poll() is None else started:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.log.close()

    async def ask(self, path: str, method: str = "GET", body: dict | None = None) -> dict:
        """What the hub, or a learner's server, answers."""
        from tornado.httpclient import AsyncHTTPClient, HTTPRequest

        text = json.dumps(body or {}) if method == "POST" else None
        address, headers = f"{self.address}{path}", {"Authorization": f"token {self.token}"}
        request = HTTPRequest(address, method=method, headers=headers, body=text, request_timeout=PATIENCE)
        answer = await AsyncHTTPClient(max_clients=1000).fetch(request)
        return json.loads(answer.body or b"{}")

    async def ready(self) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: it ended instead, or took too long; the message is the end of its log.
        """
        from tornado.httpclient import HTTPClientError

        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the hub did not start: {self.said()}")
            with contextlib.suppress(OSError, HTTPClientError):  # the proxy answers before the hub does
                await self.ask("/hub/api/")
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"the hub was not there after {START_SECONDS:g} s: {self.said()}")
            await asyncio.sleep(0.2)

    def said(self) -> str:
        """The end of its log."""
        return (self.folder / "log").read_text()[-2000:]


async def learner(hub: Hub, name: str, sources: list[str], began: float) -> dict:
    """What one learner waits for; ``failed`` says why where something did not work."""
    row = {"failed": None}
    try:
        async with asyncio.timeout(PATIENCE):
            await hub.ask(f"/hub/api/users/{name}", "POST")
            await hub.ask(f"/hub/api/users/{name}/server", "POST")
            while not (server := (await hub.ask(f"/hub/api/users/{name}"))["servers"].get("", {})).get("ready"):
                if not server:
                    raise RuntimeError(f"the server did not start: {hub.said()}")
                await asyncio.sleep(0.5)
            row["server_seconds"] = round(time.monotonic() - began, 2)
            await hub.ask(f"/user/{name}/api/contents/exercises/{NOTEBOOK}.ipynb")
            row["notebook_seconds"] = round(time.monotonic() - began, 2)
            session = {"path": f"exercises/{NOTEBOOK}.ipynb", "type": "notebook", "name": "", "kernel": {"name": "python3"}}
            kernel = (await hub.ask(f"/user/{name}/api/sessions", "POST", session))["kernel"]["id"]
            said = await run(hub, f"/user/{name}/api/kernels/{kernel}/channels", sources)
            row["check_seconds"] = round(time.monotonic() - began, 2)
            if "✓" not in said:
                row["failed"] = f"the check said {said[-200:]!r}"
    except Exception as error:
        row["failed"] = message(error)
    return row


async def run(hub: Hub, path: str, sources: list[str]) -> str:
    """What the cells print, run one after the other in a kernel."""
    from tornado.httpclient import HTTPRequest
    from tornado.websocket import websocket_connect

    request = HTTPRequest(f"ws://127.0.0.1:{hub.port}{path}", headers={"Authorization": f"token {hub.token}"}, connect_timeout=PATIENCE)
    socket_, printed = await websocket_connect(request, max_message_size=1 << 26), ""
    for source in sources:
        number = secrets.token_hex(8)
        header = {"msg_id": number, "msg_type": "execute_request", "session": number, "username": "", "version": "5.3"}
        content = {"code": source, "silent": False, "store_history": True, "allow_stdin": False, "stop_on_error": True}
        await socket_.write_message(
            json.dumps({"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell", "buffers": []})
        )
        idle = replied = False
        while not (idle and replied):
            text = await socket_.read_message()
            if text is None:
                raise ConnectionError("the kernel's connection was closed")
            heard = json.loads(text)
            if heard["parent_header"].get("msg_id") != number:
                continue
            replied = replied or heard["msg_type"] == "execute_reply"
            idle = idle or (heard["msg_type"] == "status" and heard["content"]["execution_state"] == "idle")
            if heard["msg_type"] == "stream":
                printed += heard["content"]["text"]
            elif heard["msg_type"] == "error":
                printed += f"{heard['content']['ename']}: {heard['content']['evalue']}"
    socket_.close()
    return printed


def held(hub: Hub, name: str) -> int:
    """Bytes of a learner's server and all that it started: their proportional share."""
    total = 0
    for process in psutil.Process(hub.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("JUPYTERHUB_USER") == name:
                memory = process.memory_full_info()
                total += getattr(memory, "pss", memory.uss)
    return total


async def measure(learners: int) -> dict:
    """All of them at once."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Hub(Path(folder)) as hub:
        await hub.ready()
        names, sources, began = [f"learner{number:02}" for number in range(learners)], cells(), time.monotonic()
        busy = psutil.getloadavg()[0]
        rows = await asyncio.gather(*(learner(hub, name, sources, began) for name in names))
        for name, row in zip(names, rows, strict=True):
            row["gigabytes"] = round(held(hub, name) / 1e9, 3)
    return {"learners": learners, "cores": os.cpu_count(), "load_before": round(busy, 2), "rows": rows}


def table(result: dict) -> str:
    """Medians and worst of what learners waited for."""
    good = [row for row in result["rows"] if row["failed"] is None]
    failures = [row["failed"] for row in result["rows"] if row["failed"] is not None]
    lines = [f"{result['learners']} learners on {result['cores']} cores (load before: {result['load_before']}), failures: {len(failures)}"]
    for name, unit in (("server_seconds", "s"), ("notebook_seconds", "s"), ("check_seconds", "s"), ("gigabytes", "GB")):
        if values := [row[name] for row in good]:
            lines.append(f"{name:18} median {statistics.median(values):8.2f} {unit}, most {max(values):8.2f} {unit}")
    return "\n".join([*lines, *sorted(set(failures))])


def main() -> None:
    given = options(
        "hub_load",
        __doc__,
        gpu=False,
        learners={"type": int, "default": LEARNERS, "help": "how many"},
        only={"action": "store_true", "help": "a try: saves to a temporary folder"},
    )
    try:
        import jupyterhub  # noqa: F401
    except ImportError:
        raise SystemExit("hub_load needs a hub: pip install jupyterhub, in this environment") from None
    if not shutil.which("configurable-http-proxy"):
        raise SystemExit("hub_load needs configurable-http-proxy on the path: npm install -g configurable-http-proxy")
    result = asyncio.run(measure(1 if given.smoke else given.learners))
    print(table(result))
    print("saved to", recorded.save("hub_load", result, given.out, torch.device("cpu")))


if __name__ == "__main__":
    main()
