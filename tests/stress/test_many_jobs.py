"""Many jobs at one real server: short versions of clients.py and soak.py."""

from __future__ import annotations

from clients import KINDS, two_clients
from graphs import Graphs
from soak import soak


def test_two_clients_get_their_own_answers(server):
    assert two_clients(Graphs(server), 4, 0, KINDS[3:6]) == (4, 0)


def test_cycles_hold_their_memory(server):
    sizes = soak(Graphs(server), 4)
    assert sizes[-1] - sizes[1] < 60, sizes
