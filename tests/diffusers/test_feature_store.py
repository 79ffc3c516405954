"""What a text encoder makes of the common prompts is read once, and then found in a file."""

from __future__ import annotations

import pytest
import torch

from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.hosts.diffusers.model import DiffusersHost
from fmn_core.patch.file import serialize
from fmn_core.text import feature_store, features
from fmn_core.text.features import VocabularyIndex
from fmn_core.text.templates import CAPTIONS, WORDS

COMMON = len(CAPTIONS) + sum(map(len, WORDS.values()))


@pytest.fixture
def read(pipeline, tmp_path, monkeypatch):
    """read() -> how many prompts a process that has just begun has to read for its vocabulary, and that."""

    def read(make=VocabularyIndex):
        monkeypatch.setattr(features, "_cache", {})
        host, texts = DiffusersHost(pipeline, progress_bar=False, cache=tmp_path), []
        encode_prefix = host.encode_prefix
        host.encode_prefix = lambda some, length: texts.extend(some) or encode_prefix(some, length)
        made = make(host)
        return len(texts), made

    return read


def files_in(folder):
    return sorted(folder.glob(f"*{feature_store.STORE_ENDING}"))


def test_a_later_process_reads_none_of_the_common_prompts_and_has_the_same(read, tmp_path):
    (first, one), (second, two) = read(), read()
    assert first >= COMMON and second == 1 and len(files_in(tmp_path)) == 1  # the prompt by which the encoder is known
    for own, other in zip(one.features, two.features, strict=True):
        assert own.tokens == other.tokens and torch.equal(own.token_embeds, other.token_embeds)


def test_the_patch_is_the_same(read):
    made = [read(lambda host: serialize(forget(host, "cat", make_config())[0], "x"))[1] for _ in range(2)]
    assert made[0] == made[1]


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: b"", lambda raw: raw[:40] + b"x" + raw[41:]])
def test_a_damaged_file_is_read_anew(read, tmp_path, damage):
    read()
    (file,) = files_in(tmp_path)
    raw = file.read_bytes()
    file.write_bytes(damage(raw))
    assert read()[0] >= COMMON and file.read_bytes() == raw


def test_what_is_not_finite_is_not_taken(read, tmp_path):
    read()
    (file,) = files_in(tmp_path)
    lengths = torch.tensor([1] * COMMON)
    file.write_bytes(feature_store.save({"lengths": lengths, "embeds": torch.full((COMMON, 112), float("nan"))}))
    assert read()[0] >= COMMON


def test_files_of_so_many_encoders_are_kept(tmp_path):
    for number in range(feature_store.MOST_FILES + 3):
        feature_store.save_embeds(tmp_path, str(number), ["a"], [torch.full((2, 3), float(number))])
    assert len(files_in(tmp_path)) == feature_store.MOST_FILES
    (last,) = feature_store.load_embeds(tmp_path, str(feature_store.MOST_FILES + 2), ["a"])
    assert (last == feature_store.MOST_FILES + 2).all()
    assert feature_store.load_embeds(tmp_path, "6", ["b"]) is None


def test_a_folder_that_cannot_be_written_costs_the_file_alone(read, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "write_over", lambda *given: (_ for _ in ()).throw(OSError("disk full")))
    assert read()[0] >= COMMON and not files_in(tmp_path)
