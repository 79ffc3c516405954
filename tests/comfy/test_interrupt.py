"""The host's interrupt ends long views and the reading of many prompts at once: no unit of work begins after it."""

from __future__ import annotations

import threading

import pytest
import torch
from graphs import Graphs
from recordings import recorded

from demo.server import ServerError
from fmn_core.attention.compare import CompareConfig, compare, draw_comparison
from fmn_core.attention.visualize import VIEWS, ViewConfig, visualize
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.text.concept import MOST_PROMPTS
from fmn_core.text.tokens import MOST_PHRASES

WORDS = [f"{word}{word}" for word in ("ka", "lo", "mi", "nu", "pe", "ro")]


@pytest.fixture
def interrupted(comfy):
    """interrupted(unit, work) -> how many units of a work had begun when it ended, of which that one was interrupted; and
    how many there are."""
    from fmn_core.hosts.comfy.model import progress_bar

    mm, told = comfy.model_management, []

    def interrupted(unit, work):
        told.clear()
        bar = progress_bar()

        def tell(done, total):
            bar(done, total)
            told.append((done, total))
            if done == unit:
                mm.interrupt_current_processing()

        with pytest.raises(mm.InterruptProcessingException):
            work(tell)
        return len(told), told[-1][1]

    yield interrupted
    mm.interrupt_current_processing(False)


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_ends_with_the_unit_that_is_interrupted(view, interrupted):
    granularity = {"over_steps": "steps", "heads": "heads"}.get(view, "mean")
    recording, image = recorded(*WORDS, granularity=granularity, pictures=2, steps=3), torch.rand(2, 16, 24, 3)
    whole = []
    visualize(recording, image, ViewConfig(view=view), lambda done, total: whole.append((done, total)))
    assert whole == [(i, len(whole)) for i in range(len(whole))] and len(whole) > 2 * len(WORDS)
    for unit in (0, len(WORDS), len(whole) - 2):
        begun = interrupted(unit, lambda tell: visualize(recording, image, ViewConfig(view=view), tell))
        assert begun == (unit + 1, len(whole))


def test_comparisons_end_with_the_unit_that_is_interrupted(interrupted):
    one = recorded(*WORDS)
    assert interrupted(2, lambda tell: compare(one, one, "", (8, 8), tell)) == (3, len(WORDS))
    images = (torch.rand(1, 8, 8, 3),) * 2
    whole = compare(one, one, "", (8, 8))
    assert interrupted(4, lambda tell: draw_comparison(whole, images, CompareConfig(), tell)) == (5, len(WORDS))


@pytest.mark.parametrize("what, last", [("tokenize", 100), ("contexts", 4), ("contexts", 6), ("contexts", 9)])
def test_the_reading_of_prompts_ends_with_the_batch_that_is_interrupted(comfy, host, what, last, monkeypatch):
    """Names of one length in many templates, a thousand prompts."""
    mm, done = comfy.model_management, []
    owner, name = (host.clip, "tokenize") if what == "tokenize" else (host, "require_width")  # once a text, once a batch
    whole = getattr(owner, name)

    def interrupt(*args, **kwargs):
        done.append(what)
        if len(done) == last:
            mm.interrupt_current_processing()
        return whole(*args, **kwargs)

    template = "\n".join(f"a {word} {{}}" for word in WORDS for _ in range(4))
    names = ",".join(f"{one}{other}{third}" for one in "bdfg" for other in "aeiou" for third in ("lu", "ma"))
    settings = make_config(concept_type="custom", template=template)
    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(mm.InterruptProcessingException):
        forget(host, names, settings)
    mm.interrupt_current_processing(False)
    assert last <= len(done) <= last + 1


def test_more_than_anybody_looks_at_is_refused():
    one = recorded("cat")
    many = ",".join(["cat"] * (MOST_PHRASES + 1))
    for work in (
        lambda: visualize(one, torch.zeros(1, 8, 8, 3), ViewConfig(words=many)),
        lambda: compare(one, one, many, (8, 8)),
    ):
        with pytest.raises(ForgetError, match=f"name at most {MOST_PHRASES}"):
            work()
    with pytest.raises(ForgetError, match="20 pictures or masks of 8000 x 8000 pixels: name fewer words"):
        visualize(one, torch.zeros(1, 1, 1, 3).expand(1, 8000, 8000, 3), ViewConfig(words=",".join(["cat"] * 20)))
    with pytest.raises(ForgetError, match="40 pictures or masks of 8000 x 8000 pixels"):
        compare(one, one, ",".join(["cat"] * 20), (8000, 8000))


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_more_prompts_than_can_be_read_are_refused(host, preset):
    names, template = ",".join(f"n{i}" for i in range(200)), "\n".join(f"t{i} {{}}" for i in range(200))
    with pytest.raises(ForgetError, match=f"40000 prompts would have to be read.* at most {MOST_PROMPTS}"):
        forget(host, names, make_config(preset=preset, concept_type="custom", template=template))


@pytest.fixture(scope="module")
def graphs(server):
    return Graphs(server)


def stopped_at(server, graph, node):
    """How many units a node had told, and of how many, when the host ended it after an interrupt at the first: a few later,
    as long as the request takes to come."""
    seen = []

    def stop_once(kind, data):
        if kind == "progress" and data["node"] == node:
            seen.append((data["value"], data["max"]))
            if len(seen) == 1:
                threading.Thread(target=server.interrupt).start()

    with pytest.raises(ServerError, match="interrupted"):
        server.run(graph, stop_once)
    return seen[-1]


def test_the_server_ends_long_views(server, graphs):
    """An overlay of fifteen words over a picture of 4096 pixels, and a sheet of each of five hundred words."""
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    graph = graphs.forget(words, record=True)
    for name in ("forget", "apply", "show"):
        del graph[name]
    graph["record"]["inputs"]["model"] = ["load", 0]
    graph["large"] = graphs.node("ImageScale", image=["decode", 0], upscale_method="bilinear", width=4096, height=4096)
    graph["look"]["inputs"] |= {"image": ["large", 0], "words": ""}
    done, total = stopped_at(server, graph, "look")
    assert done < total == 2 * 18  # a, photo, of, and fifteen more
    graph["look"]["inputs"] |= {"image": ["decode", 0], "words": "two\n" * 500, "view": "side_by_side"}
    done, total = stopped_at(server, graph, "look")
    assert done < total == 500 * 3


def test_the_server_ends_the_reading_of_many_prompts(server, graphs):
    names, template = ",".join(f"n{i}" for i in range(99)), "\n".join(f"t{i} {{}}" for i in range(99))
    load = graphs.node("CheckpointLoaderSimple", ckpt_name="emoji-sd-128.safetensors")
    forget = graphs.node("FMN_ForgetConcept", model=["load", 0], clip=["load", 1], concept=names)
    graph = {"load": load, "forget": forget, "save": graphs.node("FMN_SavePatch", lora=["forget", 0])}
    graphs.set_preset(graph, "forget", "fast", concept_type="custom", template=template)

    def stop(kind, data):
        if kind == "executing" and data["node"] == "forget":
            threading.Thread(target=server.interrupt).start()

    with pytest.raises(ServerError, match="interrupted"):
        server.run(graph, stop)
