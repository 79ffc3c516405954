"""Every reader of files from elsewhere, and a small file of each kind that they know."""

from __future__ import annotations

import json
import resource
import struct
import time

import torch
from conftest import ROOT
from safetensors.torch import save

from fmn_core.convert.config import ImportConfig
from fmn_core.convert.exporter import merge, to_diff, to_peft
from fmn_core.convert.importer import import_patch
from fmn_core.errors import ForgetError
from fmn_core.patch.file import read_patch, serialize
from fmn_core.patch.patch import Patch

SLOW = 5.0  # seconds of computing for the answers to one file
MUCH = 400 << 20  # bytes of memory: no file here is larger than a few of its MB


def small_patch():
    whole = read_patch(ROOT / "demo/loras/forget-cat.safetensors")
    kept = {name for name in whole.modules if "mid_block" in name}
    return Patch({key: tensor for key, tensor in whole.items() if key.split(".")[0] in kept}, whole.info)


LYCORIS = {
    "hada_w1_a": (192, 2), "hada_w1_b": (2, 112), "hada_w2_a": (192, 2), "hada_w2_b": (2, 112), "lokr_w1": (4, 4),
    "lokr_w2_a": (48, 2), "lokr_w2_b": (2, 28),
}  # fmt: skip


def corpus():
    """One small file of each kind that the readers know."""
    patch = small_patch()
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    return [
        serialize(patch, "p"),
        save(to_peft(patch), {"lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_k": 2}}'}),
        save(dict(to_diff(patch))),
        save({f"{name}.weight": torch.ones(192, 112), f"unet.{name.replace('to_k', 'to_out.0')}.bias": torch.ones(192)}),
        save({f"{name}.{part}": torch.ones(shape) for part, shape in LYCORIS.items()}),
        save(dict(patch) | {f"lora_te_text_model_{part}": torch.ones(2) for part in ("a.alpha", "b.alpha")}),
    ]  # fmt: skip


CORPUS = corpus()


def parts(raw):
    """The header of a safetensors file, and its data."""
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def joined(header, data):
    """The file of a header, read or in bytes, and its data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def all_readers(loaded, folder):
    """readers(data) has every reader look at the bytes, and fails for any other exception than theirs."""
    from fmn_core.hosts.comfy.model import ComfyHost

    host, path = ComfyHost(*loaded), folder / "bad.safetensors"
    read, imported = [], []
    good = small_patch()

    def readers(data: bytes) -> None:
        path.write_bytes(data)
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for reader, answers in (
            (lambda: read_patch(path), read),
            (lambda: import_patch(host, path, ImportConfig(energy=0.9)), imported),
            (lambda: merge(path, good, 1.0, path.with_name("out.safetensors")).unlink(), []),
        ):
            try:
                answers.append(reader() is not None)
            except ForgetError as error:
                answers.append(str(error))
                assert "bad.safetensors" in str(error) or "bad " in str(error) or "changes nothing" in str(error), error
        assert not path.with_name("out.safetensors").exists()
        assert time.process_time() - start < SLOW
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MUCH

    readers.read, readers.imported = read, imported
    return readers
