"""Steps of the presets on shapes alone, at sizes that this machine may not hold: what they take of memory."""

from types import SimpleNamespace

import torch

from benchmarks.live_tensors import Imagined
from benchmarks.pipelines import TimedHost, make_unet
from fmn_core.erasure import hybrid, resteering
from fmn_core.erasure.config import make_config, projection_names
from fmn_core.erasure.training_data import PromptSet, TrainingImages
from fmn_core.host import Prompts
from fmn_core.lora.layers import CrossAttentionLoRA, LoRAs
from fmn_core.training.loop import Descent, TrainingRun
from fmn_core.training.memory import AdaptiveCheckpointing
from fmn_core.training.state import State


def imagined_step(family: str, side: int, dtype: torch.dtype, work) -> tuple[int, int]:
    """Bytes at most of a step of a preset, and those of the UNet, which alone is on the device meanwhile."""
    unet = make_unet(family, dtype)
    scheduler = SimpleNamespace(
        alphas_cumprod=torch.linspace(0.99, 0.01, 1000), config=SimpleNamespace(prediction_type="epsilon")
    )
    tokenizer = SimpleNamespace(model_max_length=77)  # no text is read
    encoders = {"text_encoder": True, "text_encoder_2": None if family == "sd1" else True}
    pipeline = SimpleNamespace(unet=unet, vae=None, scheduler=scheduler, tokenizer=tokenizer, **encoders)
    host = TimedHost(pipeline)
    host.resolution = side
    held = sum(p.numel() * p.element_size() for p in unet.parameters())
    context = torch.zeros(2, 77, unet.config.cross_attention_dim)
    pooled = torch.zeros(2, 1280) if family == "sdxl" else None
    prompts = Prompts(("", ""), context, pooled, ((), ()))
    with host.training(host.latent_shape()), Imagined(unet.parameters()) as live:
        work(host, prompts, torch.zeros(1, *host.latent_shape()))
    return live.peak, held


def imagined_paper(host, prompts, latents, backprop: str = "full", again: bool = False) -> None:
    """A step of `paper`."""
    config = make_config("paper", steps=1, backprop=backprop, learning_rate=1e-3)
    generator = torch.Generator()
    lora = CrossAttentionLoRA(host.cross_attentions(), projection_names(config), config.rank, generator)
    calls = resteering.Calls(prompts, torch.zeros(2, 77, dtype=torch.bool), [0, 0], prompts[[0]])
    images, run = TrainingImages(latents, [0], None, None), TrainingRun(host, config)
    training = resteering.Resteering(run, calls, images, None, lora, LoRAs({}, 1, generator), None, generator)
    with lora.attached():
        take_step(training, [*lora.parameters()], again)


def imagined_balanced(host, prompts, latents, again: bool = False) -> None:
    """A step of `balanced`: a prompt of the concept and one of a near word."""
    config = make_config("balanced", learning_rate=1e-3)
    generator, one = torch.Generator(), prompts[[0]]
    lora = CrossAttentionLoRA(host.cross_attentions(), ("to_k", "to_v"), config.rank, generator)
    token_mask = torch.zeros(1, 77, dtype=torch.bool)
    texts = PromptSet(one, token_mask, [0], [0], [one], near=one, empty=one, unrelated=one)
    images, run = TrainingImages(latents, [0], None, None), TrainingRun(host, config)
    take_step(hybrid.HybridTraining(run, None, lora, texts, images, generator), [a.up for a in lora.values()], again)


def take_step(training, parameters: list, again: bool) -> None:
    """One step of a training, with or without gradient checkpointing."""
    state = State(parameters, torch.optim.AdamW(parameters), training.generator)
    Descent(AdaptiveCheckpointing(training.run.host, again), state).take(training.next_step())


IMAGINED = {
    "paper": imagined_paper,
    "paper, recomputed": lambda *given: imagined_paper(*given, again=True),
    "paper, skip connections": lambda *given: imagined_paper(*given, backprop="skip_connections"),
    "balanced": imagined_balanced,
    "balanced, recomputed": lambda *given: imagined_balanced(*given, again=True),
}
