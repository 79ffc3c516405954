"""Models in GGUF files: read, trained through, recorded and patched as the same weights in full precision are.

Set FMN_COMFYUI_GGUF to the folder of the ComfyUI-GGUF pack, whose module gguf Python has to find, to run them with it
instead of a stand-in, and FMN_GGUF_KINDS to other kinds of files, such as "Q8_0 BF16 F16".
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from gguf_files import Pack, kinds_of
from quantized import difference
from safetensors.torch import load_file

from benchmarks.architectures import narrow_model
from demo.host import CHECKPOINT
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.patch.file import read_patch
from fmn_core.patch.patch import DOWN, UP

pytestmark = pytest.mark.usefixtures("little_probed")
UNET = "model.diffusion_model."
COLUMNS = 128  # of the prompt, in blocks of 32; the demo model has 112
MATRICES = ("to_q", "to_k", "to_v", "to_out")
SHORT = {"num_images": 1, "num_inference_steps": 2, "resolution": 64, "rank": 2}
ROUNDING = 2e-3  # of what the layers compute from weights in fp16
CAT, HOUSE = "a photo of a cat", "a photo of a house"


@pytest.fixture(scope="module")
def wide(comfy):
    """The demo model's checkpoint with prompts of 128 columns, the last of them zero, known to the host."""
    from comfy.supported_models_base import ClipTarget

    from fmn_core.hosts.comfy.demo_sd import EmojiClipModel, EmojiSD, EmojiTextModel

    class WideTextModel(EmojiTextModel):
        def forward(self, tokens):
            columns, *rest = super().forward(tokens)
            return F.pad(columns, (0, COLUMNS - columns.shape[-1])), *rest

    class WideClipModel(EmojiClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006
            super(EmojiClipModel, self).__init__(
                device=device, dtype=dtype, model_options=model_options, clip_model=WideTextModel
            )

    class WideSD(EmojiSD):
        unet_config = {**EmojiSD.unet_config, "context_dim": COLUMNS}

        def clip_target(self, state_dict={}):  # noqa: B006
            return ClipTarget(comfy.sd1_clip.SD1Tokenizer, WideClipModel)

    comfy.supported_models.models.append(WideSD)
    weights = load_file(CHECKPOINT)
    for key, weight in weights.items():
        if key.startswith(UNET) and "attn2.to_k" in key or "attn2.to_v" in key:
            weights[key] = F.pad(weight, (0, COLUMNS - weight.shape[1]))
    yield weights
    comfy.supported_models.models.remove(WideSD)


@pytest.fixture(scope="module", params=os.environ.get("FMN_GGUF_KINDS", "Q4_0 mixed SDXL").split())
def models(comfy, wide, request, tmp_path_factory):
    """(MODEL, CLIP) of a GGUF file, and of what its tensors stand for in fp32: the demo's, or SDXL in Q8_0."""
    pack = Pack(tmp_path_factory.mktemp("gguf"))
    with torch.inference_mode():
        if request.param == "SDXL":
            model, clip = narrow_model("sdxl", depth=2)
            weights = model.model.diffusion_model.state_dict()
            tensors = pack.tensors(weights, kinds_of(weights, "Q8_0"), "sdxl")
            ours = pack.rebuilt(model, tensors)
            weights = {key: torch.Tensor(pack.dequantize_tensor(one, torch.float32)) for key, one in tensors.items()}
            model.model.diffusion_model.load_state_dict(weights)
            return (ours, clip), (model, clip)
        weights = {key.removeprefix(UNET): weight for key, weight in wide.items() if key.startswith(UNET)}
        tensors = pack.tensors(weights, kinds_of(weights, request.param), "sd1")
        values = {UNET + key: torch.Tensor(pack.dequantize_tensor(one, torch.float32)) for key, one in tensors.items()}
        whole = comfy.sd.load_state_dict_guess_config(wide | values)[:2]
        return (pack.load(tensors), whole[1]), whole


@pytest.fixture(scope="module")
def ours(models):
    return models[0]


@pytest.fixture(scope="module")
def whole(models):
    return models[1]


@pytest.fixture(scope="module")
def patch(whole):
    from fmn_core.hosts.comfy.model import ComfyHost

    return forget(ComfyHost(*whole), "cat", make_config())[0]


@pytest.fixture(scope="module")
def patch_of_demo():
    return read_patch(ROOT / "demo/loras/forget-cat.safetensors")


def sampled(model, clip, prompt, conditioning=None):
    """Latents, by the host's own sampler."""
    import comfy.sample

    with torch.inference_mode():
        asked = conditioning or clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        latent = torch.zeros(1, 4, 8, 8)
        given = comfy.sample.prepare_noise(latent, 1), 4, 3.0, "euler", "normal", asked, empty, latent
        return comfy.sample.sample(model, *given, seed=1, disable_pbar=True)


def deltas(patch):
    return {module: patch[module + UP].float() @ patch[module + DOWN].float() for module in patch.modules}


def test_weights_are_what_the_layers_compute_with(ours, whole):
    from fmn_core.hosts.comfy.model import ComfyHost

    host, reference = ComfyHost(*ours), ComfyHost(*whole)
    for layer, cross in [*host.cross_attentions().items()][::5]:
        for matrix in MATRICES:
            weight, module = host.weight(layer, matrix), cross.linear(matrix)
            assert type(weight) is torch.Tensor and weight.dtype == torch.float32
            with torch.inference_mode():
                rows = module(torch.eye(weight.shape[1])) - module(torch.zeros(1, weight.shape[1]))
            torch.testing.assert_close(weight, rows.T, rtol=1e-4, atol=1e-4)
            assert torch.equal(weight, reference.weight(layer, matrix).float())


def test_a_patch_is_that_of_full_precision(ours, patch):
    from fmn_core.hosts.comfy.model import ComfyHost

    made = forget(ComfyHost(*ours), "cat", make_config())[0]
    expected = deltas(patch)
    for module, delta in deltas(made).items():
        assert difference(delta, expected[module]) < ROUNDING, module
    assert made.info["report"]["erasure"]["cat"] == pytest.approx(patch.info["report"]["erasure"]["cat"], abs=0.01)


def test_training_is_that_of_full_precision_and_leaves_the_model_as_it_was(ours, whole):
    from fmn_core.hosts.comfy.model import ComfyHost

    hosts = [ComfyHost(*model) for model in (ours, whole)]
    presets = {"preset": "paper", "steps": 1, "target_modules": "q,k,v,out"}
    presets = presets if hosts[0].family == "sdxl" else {"preset": "balanced", "steps": 2}
    settings = make_config(**presets, **SHORT)
    before, tensors = sampled(*ours, CAT), [*ours[0].model.parameters()]
    losses, expected = (forget(host, "cat", settings)[1] for host in hosts)
    assert losses == pytest.approx(expected, rel=ROUNDING)
    assert all(one is other for one, other in zip(tensors, ours[0].model.parameters(), strict=True))
    assert torch.equal(sampled(*ours, CAT), before)


def test_recorded_attention_is_that_of_full_precision(ours, whole):
    from fmn_core.hosts.comfy.attention import record_attention

    maps = []
    for model, clip in (ours, whole):
        recording_model, recording = record_attention(model, clip, CAT)
        sampled(recording_model, clip, CAT)
        maps.append(recording.map(recording.layers[0]))
    assert difference(*maps) < ROUNDING


def test_a_patch_acts_as_in_full_precision(ours, whole, patch):
    """At once, or in two halves; the base model is left as it was."""
    from fmn_core.hosts.comfy.apply import apply_patch

    half = apply_patch(ours[0], patch, 0.5)
    for prompt in (CAT, HOUSE):
        before, base = sampled(*ours, prompt), sampled(*whole, prompt)
        expected = sampled(apply_patch(whole[0], patch, 1.0), whole[1], prompt)
        patched = sampled(apply_patch(ours[0], patch, 1.0), ours[1], prompt)
        assert difference(patched - before, expected - base) < 10 * ROUNDING
        twice = sampled(apply_patch(half, patch, 0.5), ours[1], prompt)
        torch.testing.assert_close(twice, patched, rtol=1e-3, atol=1e-3)
        assert torch.equal(sampled(*ours, prompt), before)


def test_a_gate_acts_as_the_patch_does(ours, patch):
    from fmn_core.hosts.comfy.apply import apply_patch
    from fmn_core.hosts.comfy.hooks import gated

    model, clip = ours
    for prompt, threshold, acts in ((CAT, -1.0, True), (HOUSE, 1.5, False)):
        with torch.inference_mode():
            asked = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        asked, _, on = gated(asked, patch, (1.0, 1.0), (0.0, 1.0), threshold)
        before, through = sampled(*ours, prompt), sampled(*ours, prompt, asked)
        assert on == [acts] and torch.equal(through, before) != acts
        if acts:
            applied = sampled(apply_patch(model, patch, 1.0), clip, prompt)
            assert difference(through, applied) < difference(applied, before)
        assert torch.equal(sampled(*ours, prompt), before)


def test_loras_that_the_host_loads_stay_on_and_are_not_read(ours, patch):
    """The host puts them beside the bytes of a quantised layer, and into the weights of another."""
    import comfy.sd

    from fmn_core.hosts.comfy.model import ComfyHost

    before = sampled(*ours, CAT)
    model = comfy.sd.load_lora_for_models(ours[0], None, dict(patch), 1.0, 0)[0]
    changed = sampled(model, ours[1], CAT)
    host, plain = ComfyHost(model, ours[1]), ComfyHost(*ours)
    for layer in [*host.cross_attentions()][::5]:
        assert torch.equal(host.weight(layer, "to_k"), plain.weight(layer, "to_k"))
    _, losses = forget(host, "cat", make_config(preset="paper", steps=1, **SHORT))
    assert not torch.equal(changed, before) and torch.equal(sampled(model, ours[1], CAT), changed)
    assert torch.tensor(losses).isfinite().all() and torch.equal(sampled(*ours, CAT), before)


class Packed(torch.nn.Module):
    """A layer as nunchaku's are: parts of its weight, under other names."""

    def __init__(self, layer):
        super().__init__()
        self.qweight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)


@pytest.mark.parametrize("matrix", ["to_q", "to_v"])
@pytest.mark.parametrize("form", ["parts", "bytes", "unknown"])
def test_what_cannot_be_read_is_refused_by_name_when_the_model_is_connected(comfy, loaded, patch_of_demo, form, matrix):
    """In whatever projection it is: layers without their weight, bytes that nobody says how to read (bitsandbytes), and
    tensors of a pack that has no such function as ComfyUI-GGUF has."""
    from fmn_core.hosts.comfy.apply import apply_patch
    from fmn_core.hosts.comfy.model import ComfyHost

    model, clip, _ = loaded
    cross = [*ComfyHost(model, clip).cross_attentions().values()][-1].module
    own = getattr(cross, matrix)
    layer = Packed(own) if form == "parts" else torch.nn.Linear(own.in_features, own.out_features, bias=False)
    if form != "parts":
        weight = torch.zeros(own.weight.numel() // 2, 1, dtype=torch.uint8)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        if form == "unknown":
            layer.weight.tensor_type = "Q9_9"
    setattr(cross, matrix, layer)
    named = {"parts": "Packed", "bytes": "uint8", "unknown": "Q9_9"}[form]
    try:
        for connected in (lambda: ComfyHost(model, clip), lambda: apply_patch(model, patch_of_demo, 1.0)):
            with pytest.raises(ForgetError, match=f"cannot be read.*{named}.*{matrix}.*load the checkpoint in fp16"):
                connected()
    finally:
        setattr(cross, matrix, own)
