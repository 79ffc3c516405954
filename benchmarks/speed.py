"""Seconds and memory of the preset `fast` at SD1.5's size: `python benchmarks/speed.py [--concepts 1 1 10 100]`.

Random weights in SD1.5's shapes: the text encoder (CLIP ViT-L's, 12 layers of width 768) and the K and V of its 16
cross-attention layers; the rest of the UNet is not there, since `fast` never runs it. The first run reads the common
words, the others find them read. The floor is the text encoder's: its arithmetic at the speed of a large product.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

if __package__ is None:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from demo.recipe.text_encoder import make_tokenizer
from fmn_core.forget import forget
from fmn_core.patch import serialize
from fmn_core.settings import ForgetSettings
from fmn_core.words import NOUNS

ENCODER = 12 * 12 * 768**2  # weights that a column goes through in ViT-L's text encoder


def make_host():
    """A DiffusersHost of SD1.5's shapes and random weights, without what `fast` does not read."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from fmn_core.hosts.diffusers import DiffusersHost

    torch.manual_seed(0)
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")) or name == "conv_in":  # conv_in says where the UNet is
            module.to_empty(device="cpu").reset_parameters()
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=CLIPTextModel(config).eval(), tokenizer=make_tokenizer(), unet=unet,
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return DiffusersHost(pipeline, progress_bar=False)


def product_speed():
    """Multiplications and additions in a second of a product as large as the text encoder's."""
    x, w = torch.randn(640, 768), torch.randn(3072, 768)
    start = time.perf_counter()
    for _ in range(20):
        x @ w.T
    return 20 * 2 * x.numel() * len(w) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(prog="python benchmarks/speed.py", description=__doc__)
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 1, 10, 100])
    options = parser.parse_args()
    host, columns = make_host(), [0]
    contexts = host.contexts

    def counted(texts, length):
        columns[0] += len(texts) * length
        return contexts(texts, length)

    host.contexts = counted
    contexts(["a cat"], 8)  # threads and buffers
    speed = product_speed()
    for index, count in enumerate(options.concepts):
        names = "\n".join(NOUNS[index :: len(NOUNS) // count][:count])
        columns[0], start = 0, time.perf_counter()
        patch, _ = forget(host, names, ForgetSettings(preset="fast"))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        size = len(serialize(patch, "patch"))
        print(
            f"{count:4} concepts: {seconds:6.2f} s{'' if index else ' with the common words'}, {columns[0]} columns read "
            f"({2 * ENCODER * columns[0] / speed:.2f} s at least), rank {patch.rank}, {size / 1e6:.2f} MB, {peak:.2f} GB",
            flush=True,
        )
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
