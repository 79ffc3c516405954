"""Killed processes and full disks: what they leave, and what comes of the same job queued again."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from bench import Bench, files, require_whole, watched
from presets import JOBS
from safetensors import safe_open
from waiting import while_changing

from demo.host import comfyui_folder
from demo.server import ComfyServer
from fmn_core.errors import ForgetError


def in_child(work: Callable[[], None]) -> int:
    """Runs work in a forked process; returns its exit code, -9 for a killed one."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:  # the parent sees no traceback
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def one_kill(bench: Bench, name: str, after: int, seconds: float) -> str:
    """Kills a job some seconds after it told of so many steps, then does it again in a new process; both leave whole files
    only."""
    out = Path(tempfile.mkdtemp(dir=bench.folder))
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))

    def doomed() -> None:
        if after == 0:
            timer.start()
        bench.run(
            name,
            out,
            watched(bench.host(JOBS[name]), lambda *call: timer.start() if call == ("show_progress", after) else None),
        )

    code = in_child(doomed)
    require_whole(out, killed=True)
    kept = list((out / "checkpoints").glob("*.checkpoint"))
    finished = (out / "job.safetensors").exists()
    step = 0
    if kept:
        with safe_open(kept[0], "pt") as file:
            step = len(file.get_tensor("losses"))
    assert code in (0, -signal.SIGKILL), f"{name} failed before it was killed"
    assert in_child(lambda: bench.again(name, out)) == 0, f"{name} does not come to the same file after kill -9"
    require_whole(out, killed=True)
    shutil.rmtree(out)
    if code == 0 or finished:
        return "done before it was killed"
    return f"resumed after step {step}" if step else "killed before the first step, begun anew"


def one_full_disk(bench: Bench, name: str, how: str, at: int) -> str:
    """A disk that is full at a write: by a limit of bytes on every file, or by an error of the at-th call of `how`."""
    out = Path(tempfile.mkdtemp(dir=bench.folder))
    whole = bench.reference(name)

    def work() -> None:
        try:
            if how == "limit":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (at, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
                bench.run(name, out)
            else:
                full_at(how, at, lambda: bench.run(name, out))
        except ForgetError as error:
            assert "could not be written" in str(error) and "free some space" in str(error), error
        finally:
            if how == "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        require_whole(out)
        found = {key: data for key, data in files(out).items() if key.startswith("job")}
        assert found in ({}, whole), "half of a job's files"
        (out / ("saved" if found else "not-saved")).touch()

    assert in_child(work) == 0, f"{name}: full disk, {how} {at}"
    saved = (out / "saved").exists()
    for mark in out.glob("*saved"):
        mark.unlink()
    bench.again(name, out)
    require_whole(out)
    shutil.rmtree(out)
    return "checkpoints given up, file saved" if saved else "refused with a sentence, nothing left"


def full_at(how: str, at: int, work: Callable[[], object]) -> None:
    """Does work while the at-th call of os.`how` finds the disk full."""
    count, original = [0], getattr(os, how)

    def call(*args, **kwargs):
        count[0] += 1
        if count[0] == at or how == "link":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    with mock.patch.object(os, how, call):
        work()


def one_server_kill(work: Path) -> str:
    """Kills a real server in the middle of a training, starts it again, and queues the same graph."""
    from graphs import Graphs

    def save(server: ComfyServer) -> dict[str, dict]:
        graphs = Graphs(server)
        settings = {"preset": "paper", "steps": 400, "num_images": 1, "num_inference_steps": 2}
        graph = graphs.forget("cat", **settings)
        return graphs, graph | {"save": graphs.node("FMN_SavePatch", lora=["forget", 0])}

    saved = []
    for name in ("undisturbed", "killed"):
        folder = work / name
        folder.mkdir()
        if name == "killed":
            with ComfyServer(comfyui_folder(), folder) as server:
                graphs, graph = save(server)
                graphs.queue(graph, "faults")
                checkpoints = folder / "user/__forget_me_not/checkpoints"
                looks = while_changing(lambda: (any(checkpoints.glob("*.checkpoint")), server.log.stat().st_size))  # noqa: B023
                assert any(written for written, _ in looks), "no checkpoint was written"
                server.process.kill()
                server.process.wait()
            require_whole(folder / "output", killed=True)
        with ComfyServer(comfyui_folder(), folder) as server:
            graphs, graph = save(server)
            graphs.wait(graphs.queue(graph, "faults"))
            if name == "killed":
                step = server.log.read_text().partition("checkpoint.resumed")[2].partition("step=")[2].split()[0]
        assert not list(folder.rglob("checkpoints/*")), "a training that ended well left its checkpoint"
        (file,) = folder.glob("output/loras/*.safetensors")
        saved.append((file.name, file.read_bytes()))
    assert saved[0] == saved[1], "the server's file is another after kill -9"
    return f"resumed after step {step}"
