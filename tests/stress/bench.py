"""The demo model, small jobs on it and their undisturbed files; and a watch on what a job asks of its host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
from presets import JOBS
from safetensors import safe_open

from fmn_core.erasure import adversarial as robust
from fmn_core.erasure import hybrid, resteering
from fmn_core.erasure import refined as balanced
from fmn_core.erasure.forget import forget
from fmn_core.inversion import textual_inversion as inversion
from fmn_core.inversion.config import InversionConfig
from fmn_core.inversion.embedding import save_embedding
from fmn_core.inversion.textual_inversion import Inversion, invert_pictures
from fmn_core.patch.file import save_patch
from fmn_core.training.checkpoint import Checkpoint

CALLS = (
    "encode", "encode_prefix", "token_embeddings", "tokenize", "encode_with_embeddings", "predict", "decode", "training",
    "weight",
    "identity", "show_progress", "check_interrupt",
)  # fmt: skip


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
