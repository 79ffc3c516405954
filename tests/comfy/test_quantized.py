"""Checkpoints in fp8, with scales and without: read rightly, trained through, and patched without a merge."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from quantized import FP8, difference, scaled

from demo.host import CHECKPOINT
from fmn_core.errors import ForgetError
from fmn_core.patch.file import read_patch

pytestmark = pytest.mark.usefixtures("little_probed")
CAT, HOUSE = "a photo of a cat", "a photo of a house"


@pytest.fixture(scope="module", params=["cast", "scaled", "mixed"])
def quantized(comfy, request):
    """MODEL, CLIP, VAE of the demo's checkpoint in fp8, as a graph loads them."""
    with torch.inference_mode():
        if request.param == "cast":
            return comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT), model_options={"dtype": FP8})[:3]
        weights, metadata = scaled({"scaled": "scale_weight", "mixed": "weight_scale"}[request.param])
        return comfy.sd.load_state_dict_guess_config(weights, metadata=metadata)[:3]


@pytest.fixture(scope="module")
def patch():
    return read_patch(ROOT / "demo/loras/forget-cat.safetensors")


def test_weights_are_what_the_layers_compute_with(quantized, loaded):
    from fmn_core.hosts.comfy.model import ComfyHost

    host, whole = ComfyHost(*quantized), ComfyHost(*loaded)
    for layer, cross in host.cross_attentions().items():
        for matrix in ("to_q", "to_k", "to_v", "to_out"):
            weight, module = host.weight(layer, matrix), cross.linear(matrix)
            with torch.inference_mode():
                rows = module(torch.eye(weight.shape[1])) - module(torch.zeros(1, weight.shape[1]))
            torch.testing.assert_close(weight.float(), rows.float().T, rtol=1e-4, atol=1e-4)
            assert difference(weight.float(), whole.weight(layer, matrix).float()) < 0.05


def test_a_patch_is_that_of_full_precision(quantized, loaded):
    """The strength and the report: a weight read without its scale made a patch 1,500 times too strong."""
    from fmn_core.erasure.config import make_config
    from fmn_core.erasure.forget import forget
    from fmn_core.hosts.comfy.model import ComfyHost
    from fmn_core.patch.patch import DOWN, UP

    made, whole = (forget(ComfyHost(*model), "cat", make_config())[0] for model in (quantized, loaded))
    for module in whole.modules:
        ours, theirs = (p[module + UP].float() @ p[module + DOWN].float() for p in (made, whole))
        assert difference(ours, theirs) < 0.05, module
    assert made.info["report"]["erasure"]["cat"] == pytest.approx(whole.info["report"]["erasure"]["cat"], abs=0.01)


def test_training_goes_through_and_leaves_the_model_as_it_was(quantized, loaded, sample):
    from fmn_core.erasure.config import make_config
    from fmn_core.erasure.forget import forget
    from fmn_core.hosts.comfy.model import ComfyHost

    settings = make_config(preset="paper", steps=3, num_images=1, num_inference_steps=2, resolution=64)
    before = sample(quantized[0], CAT)
    losses, expected = (forget(ComfyHost(*model), "cat", settings)[1] for model in (quantized, loaded))
    assert torch.equal(sample(quantized[0], CAT), before)
    assert losses == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_training_goes_through_where_the_device_multiplies_in_fp8(comfy, monkeypatch, suffix):
    """Its layers then give products without a gradient; they do so again after the training."""
    from fmn_core.erasure.config import make_config
    from fmn_core.erasure.forget import forget
    from fmn_core.hosts.comfy.model import ComfyHost

    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)
    weights, metadata = scaled(suffix)
    with torch.inference_mode():
        options = {"fp8_optimizations": True}
        loaded = comfy.sd.load_state_dict_guess_config(weights, metadata=metadata, model_options=options)[:3]
    settings = make_config(preset="paper", steps=1, num_images=1, num_inference_steps=1, resolution=64)
    layers = [*loaded[0].model.diffusion_model.modules()]
    before = [getattr(layer, "_full_precision_mm", None) for layer in layers]
    _, losses = forget(ComfyHost(*loaded), "cat", settings)
    assert torch.tensor(losses).isfinite().all()
    assert [getattr(layer, "_full_precision_mm", None) for layer in layers] == before
    assert not any("forward_comfy_cast_weights" in vars(layer) for layer in layers)


def test_a_layer_computes_its_weight_and_the_patch_exactly(quantized, patch):
    """To rounding in fp32, where the host's merge into fp8 rounds the whole matrix."""
    from fmn_core.hosts.comfy.beside import LoRABeside, factors
    from fmn_core.hosts.comfy.model import ComfyHost

    host = ComfyHost(*quantized)
    beside = factors(quantized[0], patch)
    with LoRABeside(beside, -0.5).attached(quantized[0].model), torch.inference_mode():
        for name, (up, down) in beside.items():
            layer, _, matrix = name.removeprefix("diffusion_model.").rpartition(".attn2.")
            weight = host.weight(f"{layer}.attn2", matrix.removesuffix(".0"))
            module = quantized[0].model.get_submodule(name)
            rows = module(torch.eye(weight.shape[1])) - module(torch.zeros(1, weight.shape[1]))
            torch.testing.assert_close(rows.T, weight.float() - 0.5 * up @ down, rtol=1e-4, atol=1e-4)


def test_a_patch_acts_as_in_full_precision(quantized, loaded, patch):
    """On the concept, and not more than there on what it does not concern; twice at half strength is once; the base model is
    left as it was."""
    from fmn_core.hosts.comfy.apply import apply_patch
    from fmn_core.hosts.comfy.model import ComfyHost

    def estimate(model, prompt):
        host = ComfyHost(model, *quantized[1:])
        x = torch.randn(1, *host.latent_shape(), generator=torch.Generator().manual_seed(0))
        with host.training((1, *x.shape[1:])), torch.no_grad():
            return host.predict(x, torch.tensor([600]), host.encode([prompt]))

    model, half = quantized[0], apply_patch(quantized[0], patch, 0.5)
    for prompt in (CAT, HOUSE):
        before = estimate(model, prompt)
        expected = estimate(apply_patch(loaded[0], patch, 1.0), prompt) - estimate(loaded[0], prompt)
        change = estimate(apply_patch(model, patch, 1.0), prompt) - before
        assert difference(change, expected) < 0.25
        assert change.norm() < 1.1 * expected.norm()
        torch.testing.assert_close(estimate(apply_patch(half, patch, 0.5), prompt) - before, change, rtol=1e-3, atol=1e-3)
        assert torch.equal(estimate(model, prompt), before)


@pytest.fixture
def patched_twice(quantized, loaded, patch):
    """Hosts of a quantised model and of one in full precision, both patched in a graph's mode."""
    from fmn_core.hosts.comfy.apply import apply_patch
    from fmn_core.hosts.comfy.model import ComfyHost

    with torch.inference_mode():
        return [ComfyHost(apply_patch(model[0], patch, 1.0), *model[1:]) for model in (quantized, loaded)]


def test_a_training_sees_the_patch_that_the_model_has(patched_twice):
    """It reads what layers put out, and where memory is short its backward runs blocks again outside of the host's run."""
    from fmn_core.erasure.config import make_config
    from fmn_core.erasure.forget import forget
    from fmn_core.patch.patch import DOWN, UP

    host, whole = patched_twice
    settings = make_config(preset="paper", steps=1, num_images=1, num_inference_steps=2, resolution=64)
    made, expected = (forget(one, "cat", settings)[0] for one in (host, whole))
    ours, theirs = (one.info["report"]["attention_mass"]["before"] for one in (made, expected))
    assert ours == pytest.approx(theirs, rel=0.1)
    host.free_memory = lambda: 0.0
    again = forget(host, "cat", settings)[0]
    for module in made.modules:
        ours, theirs = (one[module + UP].float() @ one[module + DOWN].float() for one in (again, made))
        assert (ours - theirs).norm() <= 0.05 * theirs.norm(), module


def test_words_are_learned_on_a_model_that_is_patched(patched_twice):
    """Whose patch, made in inference mode, the gradient to the words goes through."""
    from fmn_core.inversion.config import InversionConfig
    from fmn_core.inversion.textual_inversion import invert_pictures

    pictures = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    settings = InversionConfig(steps=1, batch_size=1, resolution=64)
    learned, expected = (invert_pictures(host, settings, images=pictures).losses for host in patched_twice)
    assert learned == pytest.approx(expected, rel=0.3)


@pytest.mark.filterwarnings("ignore")
def test_a_patch_acts_on_a_compiled_model(comfy, patch):
    """Compiled before the patch came or after, sampled without it first, and not compiled anew at every step."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    from fmn_core.hosts.comfy.apply import apply_patch

    def compiled(model):
        model = model.clone()
        set_torch_compile_wrapper(model=model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
        return model

    def sample(model, steps):
        with torch.inference_mode():
            positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (CAT, ""))
            latent = torch.zeros(1, 4, 8, 8)
            given = comfy.sample.prepare_noise(latent, 1), steps, 3.0, "euler", "normal", positive, negative, latent
            return comfy.sample.sample(model, *given, seed=1, disable_pbar=True)

    graphs = []
    with torch.inference_mode():
        model, clip = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT), model_options={"dtype": FP8})[:2]
    plain, patched = sample(model, 2), sample(apply_patch(model, patch, 1.0), 2)
    first = compiled(model)
    torch.testing.assert_close(sample(first, 2), plain)
    then = apply_patch(first, patch, 1.0)
    torch.testing.assert_close(sample(then, 2), patched)
    torch.testing.assert_close(sample(compiled(apply_patch(model, patch, 1.0)), 2), patched)
    made = len(graphs)
    sample(then, 6)
    torch.testing.assert_close(sample(first, 2), plain)
    assert len(graphs) == made


def test_strengths_tell_patched_models_apart(quantized, patch):
    """A training is not gone on with where a model has its patch at another strength."""
    from fmn_core.hosts.comfy.apply import apply_patch
    from fmn_core.hosts.comfy.identity import identity
    from fmn_core.training.checkpoint import digest

    model, clip, _ = quantized
    models = [model, apply_patch(model, patch, 0.5), apply_patch(model, patch, 1.0)]
    assert len({digest(identity(one, clip, None)) for one in models}) == 3


def test_a_gate_acts_as_the_patch_does(quantized, comfy, patch):
    from fmn_core.hosts.comfy.apply import apply_patch
    from fmn_core.hosts.comfy.hooks import gated

    model, clip, _ = quantized
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))

    def sample(model, positive, negative):
        with torch.inference_mode():
            latent = torch.zeros(1, 4, 16, 16)
            noise = comfy.sample.prepare_noise(latent, 1)
            given = positive, negative, latent
            return comfy.sample.sample(model, noise, 6, 3.0, "euler", "normal", *given, seed=1, disable_pbar=True)

    def gate(conditioning, strengths=(1.0, 1.0), span=(0.0, 1.0)):
        return gated(conditioning, patch, strengths, span, 0.5)[0]

    for prompt, acts in ((CAT, True), (HOUSE, False)):
        with torch.inference_mode():
            asked = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        plain = sample(model, asked, empty)
        applied = sample(apply_patch(model, patch, 1.0), asked, empty)
        through = sample(model, gate(asked), empty)
        assert torch.equal(through, plain) != acts
        if acts:  # the gate leaves the empty prompt alone
            assert difference(through, applied) < 0.1 * difference(applied, plain)
            ramp = sample(model, gate(asked, (0.0, 1.0)), empty)
            assert 0.1 < difference(ramp, plain) / difference(through, plain) < 0.9
            assert torch.equal(sample(model, gate(asked, (0.0, 0.0)), empty), plain)
        assert torch.equal(sample(model, asked, empty), plain)


@pytest.mark.parametrize("layer, matrix", [(0, "to_k"), (0, "to_v"), (-1, "to_k")])
def test_what_cannot_be_read_is_refused_when_the_model_is_connected(loaded, sample, layer, matrix):
    """Any layer whose stored weight is not what it computes with, since files leave some in full precision; and an engine
    without weights."""
    from fmn_core.hosts.comfy.model import ComfyHost, require_family

    model, clip, _ = loaded
    sample(model, CAT)  # takes off what another test has merged
    linear = [*ComfyHost(model, clip).cross_attentions().values()][layer].linear(matrix)
    stored = linear.weight
    linear.weight = torch.nn.Parameter(stored.detach().to(FP8), requires_grad=False)
    linear.forward = lambda x: 1500 * (x @ stored.T)
    try:
        with pytest.raises(ForgetError, match="cannot be read"):
            ComfyHost(model, clip)
    finally:
        linear.weight = stored
        del linear.forward
    engine = SimpleNamespace(model_config=model.model.model_config, diffusion_model=object())
    with pytest.raises(ForgetError, match="compiled to an engine"):
        require_family(engine)
