"""Files of learned words: what hosts read of them, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmn_core.errors import ForgetError
from fmn_core.inversion.config import InversionConfig
from fmn_core.inversion.embedding import add_embedding, read_embedding, save_embedding
from fmn_core.inversion.textual_inversion import (
    invert_pictures,
)

QUICK = InversionConfig(steps=3, num_images=2, num_inference_steps=3, learning_rate=1e-2)


@pytest.fixture
def vectors(host):
    return {"clip_l": host.token_embeddings("cat dog rose")["clip_l"] + 0.1}


def test_comfyui_reads_the_file_in_a_prompt(host, vectors, tmp_path, monkeypatch):
    save_embedding(vectors, tmp_path / "mine.safetensors", asdict(QUICK))
    assert load_file(tmp_path / "mine.safetensors").keys() == {"emb_params"}
    monkeypatch.setattr(host.clip.tokenizer.clip_l, "embedding_directory", [str(tmp_path)])
    prompt = "a photo of embedding:mine on a table"
    assert [t.text for t in host.tokenize(prompt)].count("embedding") == 3
    with host.training((1, 4, 8, 8), text=True), torch.no_grad():
        expected = host.encode_with_embeddings("a photo of {} on a table", vectors).prompt_embeds
    assert torch.allclose(host.encode([prompt]).prompt_embeds, expected, atol=1e-5)
    assert torch.allclose(host.token_embeddings("embedding:mine")["clip_l"], vectors["clip_l"])


def test_diffusers_reads_the_file(comfy, host, vectors, tmp_path):
    from demo.export import make_pipeline
    from fmn_core.hosts.diffusers.model import DiffusersHost

    file = tmp_path / "mine.safetensors"
    save_embedding(vectors, file, {})
    pipeline = make_pipeline()
    pipeline.load_textual_inversion(str(tmp_path), weight_name=file.name, token="<theirs>")
    other = DiffusersHost(pipeline, progress_bar=False)
    assert add_embedding(other, "ours", file) == "<ours>"
    with host.training((1, 4, 8, 8), text=True), torch.no_grad():
        expected = host.encode_with_embeddings("a photo of {} on a table", vectors).prompt_embeds
    for token in ("<theirs>", "<ours>"):
        prompts = other.encode([f"a photo of {token} on a table"])
        assert torch.allclose(prompts.prompt_embeds, expected, atol=1e-4)
        assert [t.id < 0 for t in prompts.tokens[0]].count(True) == 3
    with pytest.raises(ForgetError, match="knows the token <ours> already"):
        add_embedding(other, "ours", file)


def test_the_file_for_two_text_encoders(xl_pipeline, tmp_path):
    from fmn_core.hosts.diffusers.model import DiffusersHost

    host = DiffusersHost(copy.deepcopy(xl_pipeline), progress_bar=False)
    vectors = {name: v + 0.1 for name, v in host.token_embeddings("cat dog").items()}
    save_embedding(vectors, tmp_path / "xl.safetensors", {})
    assert load_file(tmp_path / "xl.safetensors").keys() == {"clip_l", "clip_g"}
    with host.training((1, *host.latent_shape()), text=True), torch.no_grad():
        expected = host.encode_with_embeddings("a photo of {}", vectors)
    token = add_embedding(host, "xl", tmp_path / "xl.safetensors")
    read = host.encode([f"a photo of {token}"])
    assert torch.allclose(read.prompt_embeds, expected.prompt_embeds, atol=1e-5)
    assert torch.allclose(read.pooled_prompt_embeds, expected.pooled_prompt_embeds, atol=1e-5)


def test_files_that_do_not_fit_get_a_sentence(tmp_path, vectors):
    file = tmp_path / "e.safetensors"
    save_embedding(vectors, file, {})
    assert torch.equal(read_embedding(file, {"clip_l": 112})["clip_l"], vectors["clip_l"])
    with pytest.raises(ForgetError, match="never overwritten"):
        save_embedding(vectors, file, {})
    for encoders in ({"clip_l": 768}, {"clip_l": 112, "clip_g": 1280}):
        with pytest.raises(ForgetError, match="learned with another model"):
            read_embedding(file, encoders)
    with pytest.raises(ForgetError, match="There is no embedding"):
        read_embedding(tmp_path / "none.safetensors", {"clip_l": 112})
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ForgetError, match="cannot be read"):
        read_embedding(tmp_path / "cut.safetensors", {"clip_l": 112})
    save_file({"emb_params": torch.full((1, 112), float("inf"))}, tmp_path / "inf.safetensors")
    with pytest.raises(ForgetError, match="not finite"):
        read_embedding(tmp_path / "inf.safetensors", {"clip_l": 112})
    save_file({"<s1>": torch.ones(112), "<s2>": torch.ones(768)}, tmp_path / "two.safetensors")
    with pytest.raises(ForgetError, match="learned with another model"):
        read_embedding(tmp_path / "two.safetensors", {"clip_l": 112})


def test_the_originals_tokens_come_in_the_order_of_their_numbers(tmp_path):
    save_file({f"<s{i}>": torch.full((4,), float(i)) for i in range(1, 13)}, tmp_path / "step_inv_500.safetensors")
    read = read_embedding(tmp_path / "step_inv_500.safetensors", {"clip_h": 4})["clip_h"]
    assert read[:, 0].tolist() == list(range(1, 13))


@pytest.mark.parametrize("given", [False, True])
def test_a_template_that_calls_for_an_embedding_that_is_not_there_is_refused(host, cats, given):
    calling = replace(QUICK, concept_type="custom", template="a {} beside embedding:missing")
    with pytest.raises(ForgetError, match="There is no embedding behind `embedding:missing`"):
        invert_pictures(host, calling, images=cats if given else None, concept="cat")
    with pytest.raises(ForgetError, match="`template` is for the type `custom`"):
        replace(calling, concept_type="object")
