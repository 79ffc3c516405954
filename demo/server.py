"""A real ComfyUI server on a loopback port, started, asked and stopped from Python."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import aiohttp

PACK = Path(__file__).parent.parent
LAUNCHER = Path(__file__).with_name("launch_comfyui.py")


class ServerError(RuntimeError):
    """The server refused or failed: the message is the server's own."""


class ComfyServer:
    """ComfyUI from `folder` with this pack alone, as a context manager; outputs go below `work`.

    `device`: the options that say where it computes; `environment`: variables beside this process' own.
    """

    def __init__(
        self,
        folder: Path,
        work: Path,
        python: str = sys.executable,
        device: Sequence[str] = ("--cpu",),
        environment: Mapping[str, str] | None = None,
    ):
        self.folder, self.work, self.python = folder, work, python
        self.device, self.environment = device, {**os.environ, "HF_HUB_OFFLINE": "1", "FMN_DEMO": "1", **(environment or {})}
        self.log = work / "comfyui.log"
        self.output = work / "output"

    def __enter__(self) -> ComfyServer:
        folders = {name: self.work / name for name in ("output", "temp", "user", "input")}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        places = [f"--{name}-directory={folder}" for name, folder in folders.items()]
        # Learned words go to the first of the host's embeddings folders: one of this server's own.
        embeddings, config = self.work / "embeddings", self.work / "model_paths.yaml"
        embeddings.mkdir(exist_ok=True)
        config.write_text(json.dumps({"work": {"is_default": True, "embeddings": str(embeddings)}}))
        packs = [
            "--disable-api-nodes",
            "--disable-all-custom-nodes",
            "--whitelist-custom-nodes",
            pack_link(self.folder).name,
        ]
        command = [self.python, str(LAUNCHER), str(self.folder), *self.device, "--disable-auto-launch", f"--port={port}"]
        command += ["--extra-model-paths-config", str(config)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, *places, *packs], cwd=self.folder, stdout=log, stderr=log, env=self.environment
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _wait(self, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI stopped while starting:\n{self.log.read_text()[-3000:]}")
            try:
                self.get("system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {seconds:.0f} s: see {self.log}")

    def read(self, path: str) -> bytes:
        """What the server answers at a path."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=60) as response:
            return response.read()

    def get(self, path: str) -> dict:
        """The JSON at a path of the server."""
        return json.loads(self.read(path))

    def picture(self, image: dict) -> bytes:
        """The file behind an entry of a node's `images`."""
        return self.read(f"view?{urllib.parse.urlencode(image)}")

    def run(self, prompt: dict, on_event: Callable[[str, dict], None] = lambda kind, data: None) -> dict[str, dict]:
        """Queues an API-format prompt, follows the websocket to its end and returns each node's `ui` outputs.

        `on_event` gets every message's type and data; binary previews come as ("preview", {"bytes": ..., "node": ...}).
        Raises ServerError with the server's words where the prompt is refused or a node fails.
        """
        return asyncio.run(self._run(prompt, on_event))

    async def _run(self, prompt, on_event):
        client = os.urandom(8).hex()
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket:
                async with session.post(f"{self.url}/prompt", json={"prompt": prompt, "client_id": client}) as answer:
                    reply = await answer.json()
                    if answer.status != 200:
                        raise ServerError(json.dumps(reply, indent=1))
                at_work = None
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.BINARY:
                        on_event("preview", {"bytes": message.data, "node": at_work})
                        continue
                    kind, data = (event := json.loads(message.data))["type"], event["data"]
                    if data.get("prompt_id", reply["prompt_id"]) != reply["prompt_id"]:
                        continue
                    at_work = data["node"] if kind == "executing" else at_work
                    on_event(kind, data)
                    if kind in ("execution_error", "execution_interrupted"):
                        raise ServerError(data.get("exception_message", "interrupted"))
                    if kind == "executing" and data["node"] is None:  # sent once the history is written
                        break
                else:
                    raise ServerError(f"The connection to ComfyUI broke off: see {self.log}")
        return self.get(f"history/{reply['prompt_id']}")[reply["prompt_id"]]["outputs"]

    def interrupt(self) -> None:
        """Asks the server to stop what it is doing, as the page's button does."""
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/interrupt", method="POST"), timeout=60).close()


def pack_link(comfyui: Path) -> Path:
    """This pack in ComfyUI's custom_nodes, linked there unless it is there already."""
    nodes = comfyui / "custom_nodes"
    for entry in nodes.iterdir():
        if entry.resolve() == PACK.resolve():
            return entry
    link = nodes / "forget-me-not"
    if link.exists():
        raise ServerError(f"{link} is another copy of the pack: run the demo from there, or move it away.")
    try:
        link.symlink_to(PACK, target_is_directory=True)
    except OSError as error:  # Windows without developer mode
        raise ServerError(f"Could not link the pack into {nodes}: copy {PACK} there as {link.name}.") from error
    return link
