"""Faults put into every preset and the inversion, in ComfyUI's own modules, and what is left after each of them.

    python tests/stress/faults.py [--runs N] [--seed S]

After each fault the model's next picture is the same to the bit, nothing is hooked onto it, every file is whole, and the
same inputs queued again give the same file as an undisturbed run. A run that is killed is a process of its own.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from presets import JOBS  # noqa: E402
from waiting import while_changing  # noqa: E402

from demo.host import CHECKPOINT, comfyui_folder, import_comfyui  # noqa: E402
from demo.server import ComfyServer  # noqa: E402
from fmn_core.erasure import adversarial as robust  # noqa: E402
from fmn_core.erasure import hybrid, resteering  # noqa: E402
from fmn_core.erasure import refined as balanced  # noqa: E402
from fmn_core.erasure.forget import forget  # noqa: E402
from fmn_core.errors import ForgetError  # noqa: E402
from fmn_core.inversion import textual_inversion as inversion  # noqa: E402
from fmn_core.inversion.config import InversionConfig  # noqa: E402
from fmn_core.inversion.embedding import save_embedding  # noqa: E402
from fmn_core.inversion.textual_inversion import Inversion, invert_pictures  # noqa: E402
from fmn_core.patch.file import save_patch  # noqa: E402
from fmn_core.training.checkpoint import Checkpoint  # noqa: E402

CALLS = (
    "encode", "encode_prefix", "token_embeddings", "tokenize", "encode_with_embeddings", "predict", "decode", "training",
    "weight",
    "identity", "show_progress", "check_interrupt",
)  # fmt: skip
ALLOCATES = ("encode", "encode_prefix", "encode_with_embeddings", "predict", "decode", "training")


class Fault(Exception):
    """What nobody expects."""


class Bench:
    """The demo model as a graph loads it, small jobs on it, and their undisturbed files."""

    def __init__(self, comfy, loaded, folder: Path):
        self.comfy, self.loaded, self.folder = comfy, loaded, folder
        self.whole: dict[str, bytes] = {}
        self.stack = ExitStack()
        for module in (resteering, hybrid, inversion):  # fewer probes: the faults are in the phases, not in their length
            self.stack.enter_context(mock.patch.object(module, "PROBES", 2))
        self.stack.enter_context(mock.patch.object(robust, "LEARNED_STEPS", 3))
        self.stack.enter_context(mock.patch.object(robust, "NEAR", 1))
        self.stack.enter_context(mock.patch.object(balanced, "CHECK", 2))
        self.picture = self.sample()
        self.weights = [(p, p.detach().clone()) for p in self.model.model.parameters()]
        self.options = repr(self.model.model_options)

    @property
    def model(self):
        return self.loaded[0]

    def sample(self) -> torch.Tensor:
        """Latents of a picture by the host's own sampler, as a graph runs it."""
        model, clip, _ = self.loaded
        with torch.inference_mode():
            cond, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a cat", ""))
            latent = torch.zeros(1, 4, 8, 8)
            state = torch.get_rng_state()
            noise = self.comfy.sample.prepare_noise(latent, 1)
            try:
                return self.comfy.sample.sample(
                    model, noise, 2, 3.0, "euler", "normal", cond, empty, latent, seed=1, disable_pbar=True
                )
            finally:
                torch.set_rng_state(state)

    def host(self, settings):
        from fmn_core.hosts.comfy.model import ComfyHost

        return ComfyHost(*self.loaded)

    def run(self, name: str, out: Path, host=None, every: float = 0.0) -> Path:
        """Does a job and saves it under `out`, with a checkpoint after every step; returns the file."""
        settings = JOBS[name]
        host = host or self.host(settings)
        path = out / "job.safetensors"

        def save(result, path: Path) -> Path:
            if isinstance(result, Inversion):
                save_embedding(result.vectors, path, asdict(settings))
            else:
                save_patch(result, path)
            return path

        def rescue(result) -> Path:
            return save(result, out / f"unfinished-{len(list(out.iterdir()))}.safetensors")

        with Checkpoint(out / "checkpoints", rescue, every) as checkpoint:
            if isinstance(settings, InversionConfig):
                result = invert_pictures(host, settings, concept="cat", checkpoint=checkpoint)
            else:
                result = forget(host, "cat", settings, checkpoint=checkpoint)[0]
            save(result, path)
        return path

    def reference(self, name: str) -> dict[str, bytes]:
        """The files of an undisturbed run, made once."""
        if name not in self.whole:
            out = self.folder / f"whole-{len(self.whole)}"
            out.mkdir()
            self.run(name, out)
            self.whole[name] = files(out)
            assert not (out / "checkpoints").exists(), "a run that ended well left its checkpoint"
        return self.whole[name]

    def check(self, out: Path) -> None:
        """The host is as it was, and every file is whole."""
        for (parameter, values), now in zip(self.weights, self.model.model.parameters(), strict=True):
            assert now is parameter or not now.requires_grad, "a parameter was put in another's place"
            assert torch.equal(now, values) and now.grad is None, "a weight has changed"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in self.model.model.modules()), "a hook was left"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in self.loaded[1].cond_stage_model.modules())
        assert repr(self.model.model_options) == self.options and not self.model.patches
        assert torch.equal(self.sample(), self.picture), "the next picture is another"
        require_whole(out)

    def again(self, name: str, out: Path) -> None:
        """The same inputs once more, undisturbed, give the undisturbed files."""
        for file in out.glob("job*"):
            file.unlink()
        self.run(name, out)
        found = {key: data for key, data in files(out).items() if key.startswith("job")}
        assert found == self.reference(name), f"{name} gives another file after a fault"


def files(out: Path) -> dict[str, bytes]:
    """Name -> bytes of all files in a folder."""
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.is_file()}


def require_whole(out: Path, killed: bool = False) -> None:
    """Every file with a name is whole; only a killed process leaves half of one, and under no name."""
    for file in out.rglob("*"):
        if file.is_file() and file.suffix in (".safetensors", ".checkpoint"):
            with safe_open(file, "pt") as opened:
                assert opened.keys()
        elif file.is_file():
            assert killed and file.name.startswith(".fmn-"), f"{file} was left"


def watched(host, action: Callable[[str, int], object]):
    """A host that asks `action(call, number)` before each of its CALLS; what it returns, if anything, takes the place of
    the answer."""
    count = Counter()

    def wrap(name):
        original = getattr(host, name)

        def call(*args, **kwargs):
            count[name] += 1
            instead = action(name, count[name])
            return original(*args, **kwargs) if instead is None else instead(original(*args, **kwargs))

        return call

    for name in CALLS:
        setattr(host, name, wrap(name))
    host.count = count
    return host


def calls_of(bench: Bench, name: str) -> Counter:
    """How often an undisturbed job makes each call."""
    host = watched(bench.host(JOBS[name]), lambda call, number: None)
    out = Path(tempfile.mkdtemp(dir=bench.folder))
    bench.run(name, out, host)
    shutil.rmtree(out)
    return host.count


def nan(answer):
    return answer * float("nan")


FAULTS = {
    "exception": (CALLS, lambda comfy: (_ for _ in ()).throw(Fault())),
    "out of memory": (ALLOCATES, lambda comfy: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("Allocation failed."))),
    "interrupt": (("show_progress", "check_interrupt"), lambda comfy: comfy.model_management.interrupt_current_processing()),
    "NaN in a batch": (("predict",), lambda comfy: nan),
    "model unloaded": (("check_interrupt", "show_progress"), lambda comfy: comfy.model_management.unload_all_models()),
}


def one_fault(bench: Bench, kind: str, name: str, call: str, number: int) -> str:
    """Puts one fault into one call of one job; returns what came of it, after checking what is left."""
    mm, make = bench.comfy.model_management, FAULTS[kind][1]
    out = Path(tempfile.mkdtemp(dir=bench.folder))
    host = watched(bench.host(JOBS[name]), lambda c, n: make(bench.comfy) if (c, n) == (call, number) else None)
    state = torch.get_rng_state()
    came = "went through"
    try:
        bench.run(name, out, host)
    except (Fault, torch.cuda.OutOfMemoryError, mm.InterruptProcessingException) as error:
        came = "stopped"
        if kind == "out of memory":
            assert "lower `batch_size`" in str(error)
    except ForgetError:
        came = "refused with a sentence"
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    mm.interrupt_current_processing(False)
    rescued = bool(list(out.glob("unfinished*")))
    bench.check(out)
    if kind != "NaN in a batch":  # which changes what is trained
        bench.again(name, out)
    shutil.rmtree(out)
    return came + (", steps kept" if rescued else "")


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


def draw_faults(bench: Bench, rng: random.Random, runs: int, names: list[str]) -> list[tuple[str, str, str, int]]:
    """`runs` faults: first every kind of fault in every kind of call that each job makes, in its first, last and a random
    one, then at random."""
    counts = {name: calls_of(bench, name) for name in names}
    plan = []
    for kind, (calls, _) in FAULTS.items():
        for name, count in counts.items():
            for call in calls:
                if count[call]:
                    plan += [(kind, name, call, n) for n in {1, count[call], rng.randint(1, count[call])}]
    rng.shuffle(plan)
    while len(plan) < runs:
        kind, name = rng.choice([*FAULTS]), rng.choice(names)
        call = rng.choice([call for call in FAULTS[kind][0] if counts[name][call]])
        plan.append((kind, name, call, rng.randint(1, counts[name][call])))
    return plan[:runs]


def table(results: dict[str, Counter]) -> str:
    """What came of each kind of fault, as Markdown."""
    lines = ["| fault | runs | what came of it |", "|---|---|---|"]
    for kind, came in results.items():
        lines.append(f"| {kind} | {came.total()} | {', '.join(f'{text}: {n}' for text, n in sorted(came.items()))} |")
    return "\n".join(lines)


def suite(bench: Bench, runs: int, seed: int, names: list[str]) -> dict[str, Counter]:
    """A share of `runs` for each kind of fault, of which half are killed processes; raises AssertionError at the first
    that leaves harm, after printing which it was."""
    rng, results, doing = random.Random(seed), {}, ""
    try:
        steps = {}
        for name in names:
            doing = f"undisturbed {name}"
            bench.reference(name)
            steps[name] = calls_of(bench, name)["show_progress"]
        for number in range(runs // 2):
            name = rng.choice(names)
            after, seconds = rng.randint(0, steps[name]), rng.uniform(0, 0.2)
            doing = f"kill -9, run {number}: {name}, {seconds:.3f} s after step {after} of {steps[name]}"
            results.setdefault("kill -9", Counter())[one_kill(bench, name, after, seconds)] += 1
        full = [("limit", n) for n in (0, 1, 1 << 10, 1 << 14, 1 << 16, 1 << 20)]
        full += [(how, n) for how in ("fsync", "replace", "link") for n in (1, 2, 5, 8)]
        for number in range(max(runs // 10, 3)):
            name, (how, at) = rng.choice(names), full[number] if number < len(full) else rng.choice(full)
            doing = f"full disk, run {number}: {name}, {how} {at}"
            results.setdefault("disk full", Counter())[one_full_disk(bench, name, how, at)] += 1
        for number, fault in enumerate(draw_faults(bench, rng, runs - runs // 2 - max(runs // 10, 3), names)):
            doing = f"run {number}: {fault}"
            results.setdefault(fault[0], Counter())[one_fault(bench, *fault)] += 1
    except BaseException:
        print(f"FAILED at seed {seed}: {doing}", file=sys.stderr)
        raise
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="how many faults; half of them are killed processes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    comfy, start = import_comfyui(), time.monotonic()
    with torch.inference_mode():
        loaded = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT))[:3]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(comfy, loaded, Path(folder))
        with bench.stack:
            results = suite(bench, options.runs, options.seed, [*JOBS])
        print(table(results), flush=True)
        print("A whole server, killed:", one_server_kill(Path(folder)))
    print(f"\n{sum(c.total() for c in results.values())} runs, seed {options.seed}, {time.monotonic() - start:.0f} s: ")
    print("each time the next picture was the same, no file torn, and the same inputs gave the undisturbed file.")


if __name__ == "__main__":
    main()
