"""A recording as data for other tools: NumPy's .npz, or JSON."""

from __future__ import annotations

import io
import json

import numpy as np

from .heatmap import groups_of, require_recorded, shares
from .recorder import AttentionRecording


def facts(recording: AttentionRecording) -> dict:
    """What the recording is of: prompt, tokens, which columns each word has, its share of the attention, and the layers."""
    require_recorded(recording)
    return {
        "prompt": recording.text,
        "tokens": [{"text": token.text, "kind": token.kind, "id": token.id} for token in recording.tokens],
        "words": groups_of(recording.tokens),
        "shares": shares(recording),
        "steps": [[frame.first, frame.last] for frame in recording.frames],
        "layers": {name: list(recording.sizes[name][2:]) for name in recording.layers},
    }


def as_json(recording: AttentionRecording) -> bytes:
    """The facts, as JSON."""
    return json.dumps(facts(recording), indent=1, ensure_ascii=False).encode()


def as_npz(recording: AttentionRecording) -> bytes:
    """Each layer's mean map under its name, [B, H, h, w, T] with H = 1 unless heads are apart, or where steps were kept,
    [frames, B, H, h, w, T]; and the facts as JSON text under `facts`."""
    several = recording.settings.granularity == "steps"
    maps = {"facts": np.array(as_json(recording).decode())}
    for name in recording.layers:
        frames = range(len(recording.frames)) if several else [None]
        parts = [recording.map(name, frame).float().numpy() for frame in frames]
        maps[name] = np.stack(parts) if several else parts[0]
    file = io.BytesIO()
    np.savez_compressed(file, **maps)  # type: ignore[arg-type]  # numpy's stubs take any name for allow_pickle
    return file.getvalue()
