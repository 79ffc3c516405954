"""The benchmarks run, and their figures mean what they say."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.quality import Picture, asked_for, kept, score
from demo.judge import LABELS
from demo.vocabulary import OBJECTS, STYLES


class Seer:
    """A judge that is told what it sees."""

    def __init__(self, **seen):
        self.seen = seen

    def features(self, pictures):
        return pictures

    def names(self, kind, features):
        return self.seen.get(kind, [""] * len(features))


def test_the_figures_are_those_of_the_definitions():
    pictures = [
        Picture("a cat", 0, "cat", group="plain"),
        Picture("a cat, neon", 1, "cat", "neon", group="in a style"),
        Picture("a dog", 500_000, "dog", group="neighbour"),
        Picture("a car, neon", 500_001, "car", "neon", group="other"),
    ]
    base = torch.zeros(4, 2, 2, 3)
    made = base.clone()
    made[0], made[3] = 1, 0.5
    judge = Seer(object=["dog", "cat", "dog", "bus"], style=["", "", "", "neon"])
    figures = score("object", ("cat",), judge, pictures, made, base)
    assert (figures["ua"], figures["ira"], figures["cra"], figures["neighbours"]) == (0.5, 0.5, 1.0, 1.0)
    assert figures["drift"] == 0.25 and figures["h"] == pytest.approx(3 / (2 + 2 + 1))
    assert figures["groups"] == {"plain": 1.0, "in a style": 0.0}


@pytest.mark.parametrize(("kind", "name"), [("object", "cat"), ("style", "neon"), ("identity", "ada")])
def test_prompts_name_the_target_and_kept_ones_do_not(kind, name):
    asked, others = asked_for(kind, (name,), 0), kept(kind, (name,), 0, False)
    synonyms = OBJECTS["cat"].synonyms.split()
    assert all(any(word[:3] in p.prompt for word in [name, *synonyms]) for p in asked)
    assert others and not any(name in (p.object, p.style, p.person) for p in others)
    assert len({p.seed for p in asked + others}) == len(asked + others)
    assert {p.style for p in others} <= {"", *STYLES} and set(LABELS) == {"object", "style", "person"}


def test_the_quick_command_prints_a_table_in_which_fast_forgets_and_keeps(run_python, tmp_path):
    file = tmp_path / "rows.json"
    command = ["benchmarks/quality.py", "--quick", "--targets", "cat", "--methods", "fast", "UCE"]
    run_python(*command, "--json", file)
    base, fast, uce = json.loads(file.read_text())
    assert (base["method"], fast["method"], uce["method"]) == ("base", "fast", "UCE")
    assert fast["ua"] >= 0.95 and fast["ira"] >= base["ira"] - 0.1 and fast["drift"] <= 0.01
    assert base["ua"] < 0.3 and base["drift"] == 0 and fast["base"]["ua"] == base["ua"]
    assert fast["h"] > uce["h"]
