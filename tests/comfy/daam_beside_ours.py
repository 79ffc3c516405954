"""DAAM's own package and ours on one pipeline, prompt and seed: prints each word's correlation as JSON.

python tests/comfy/daam_beside_ours.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def import_daam():
    """The package with empty modules for what it draws and parses sentences with, which its heat maps do not use."""
    for name in ("matplotlib", "matplotlib.pyplot", "spacy", "spacy.tokens"):
        sys.modules[name] = ModuleType(name)
    sys.modules["matplotlib"].pyplot = sys.modules["matplotlib.pyplot"]
    sys.modules["matplotlib.pyplot"].Axes = None
    sys.modules["spacy"].tokens = sys.modules["spacy.tokens"]
    sys.modules["spacy.tokens"].Token = None
    import daam

    return daam


def main() -> None:
    import torch

    from demo.export import make_pipeline
    from demo.host import comfyui_folder, import_comfyui
    from fmn_core.attention.heatmap import word_heat_maps
    from fmn_core.hosts.diffusers.attention import record_attention
    from fmn_core.hosts.diffusers.model import DiffusersHost

    import_comfyui(comfyui_folder())
    daam = import_daam()
    pipeline = make_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.register_to_config(sample_size=64)  # DAAM knows pictures of 512 pixels alone
    prompt, words = "a neon drawing of a cat beside the house", ["neon", "drawing", "cat", "house", "a neon drawing"]

    def draw():
        generator = torch.Generator().manual_seed(3)
        return pipeline(prompt, num_inference_steps=2, generator=generator, output_type="np", height=512, width=512).images

    host = DiffusersHost(pipeline, progress_bar=False)
    with record_attention(host, prompt) as recording:
        watched = draw()
    plain = draw()
    with torch.no_grad(), daam.trace(pipeline, data_dir=tempfile.mkdtemp()) as trace:
        draw()
        theirs = trace.compute_global_heat_map()
    seen = [name for name in recording.layers if not name.startswith("mid")]  # those that DAAM locates
    correlations = {}
    for word in words:
        one = theirs.compute_word_heat_map(word).heatmap.flatten().double()
        other = word_heat_maps(recording, [word], 64, 64, layers=seen)[0, 0].flatten().double()
        correlations[word] = torch.corrcoef(torch.stack([one, other]))[0, 1].item()
    print(json.dumps({"correlation": correlations, "same picture": bool((watched == plain).all())}))


if __name__ == "__main__":
    main()
