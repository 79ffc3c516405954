"""The state of a training in a file: whole, its own, found again, and never in the way."""

from __future__ import annotations

import os
import time

import pytest
import torch
from safetensors.torch import load, save
from torch.utils._python_dispatch import TorchDispatchMode

from fmn_core.errors import ForgetError
from fmn_core.files.atomic import LEFT_OVER, write_over
from fmn_core.training import checkpoint as module
from fmn_core.training.checkpoint import Checkpoint, State, digest


class Host:
    """What a checkpoint asks of a host."""

    device = torch.device("cpu")

    def token_embeddings(self, text):
        return {"clip_l": torch.ones(len(text), 2)}

    def identity(self):
        return [torch.ones(2, 2)]


def make_state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = [
        torch.rand(3, 2, generator=generator),
        torch.rand(4, generator=generator),
        torch.rand(1, generator=generator),
    ]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    return State(parameters, optimizer, generator, figures={"totals": []}, tensors={"best": []})


def begin_step(state):
    """All of a step but the optimiser's."""
    for parameter in state.parameters[:2]:  # the third never gets a gradient
        parameter.grad = torch.randn(parameter.shape, generator=state.generator)
    state.hold()


def step(state):
    begin_step(state)
    state.step()
    state.losses.append(state.parameters[0].sum().item())
    state.figures["totals"].append(0.1)
    state.tensors["best"] = [state.parameters[1].clone()]


def train(folder, steps, stop=None, seed=0, **inputs):
    """The state after training; `stop` raises after so many steps."""
    checkpoint = Checkpoint(folder, every=0)
    checkpoint.begin(Host(), ["cat"], seed, inputs)
    state = make_state(seed)
    with checkpoint:
        begun = checkpoint.resume(state, lambda: state.losses)
        while len(state.losses) < steps:
            if len(state.losses) == stop:
                raise KeyboardInterrupt
            step(state)
            checkpoint.keep()
    return state, begun


def same(one, other):
    kept, others = one.stored(), other.stored()
    return kept.keys() == others.keys() and all(torch.equal(kept[key], others[key]) for key in kept)


def test_a_resumed_training_is_the_same_to_the_bit(tmp_path):
    whole, _ = train(None, 7)
    for stop in range(1, 7):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, 7, stop)
        resumed, begun = train(tmp_path, 7)
        assert begun == stop and same(resumed, whole)
        assert not tmp_path.exists() or not any(tmp_path.iterdir()), "the file stays after success"


def test_other_inputs_begin_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 5, 3, lr=1)
    assert train(tmp_path, 5, lr=2)[1] == 0 and train(tmp_path, 5, lr=1)[1] == 3


@pytest.mark.parametrize(
    "change", [lambda raw: raw[:-3], lambda raw: b"", lambda raw: b"x" * 99, lambda raw: raw[:8] + raw[9:]]
)
def test_a_damaged_checkpoint_is_as_good_as_none(tmp_path, change):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 5, 3)
    (file,) = tmp_path.glob("*.checkpoint")
    file.write_bytes(change(file.read_bytes()))
    state, begun = train(tmp_path, 5)
    assert begun == 0 and same(state, train(None, 5)[0])


def test_values_that_are_no_numbers_are_not_taken(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 5, 3)
    (file,) = tmp_path.glob("*.checkpoint")
    kept = load(file.read_bytes())
    file.write_bytes(save(kept | {"parameters.0": kept["parameters.0"] * float("nan")}))
    state, begun = train(tmp_path, 5)
    assert begun == 0 and same(state, train(None, 5)[0])


def before_the_optimisers_step(state):
    begin_step(state)
    state.figures["scale"][:] = [8.0, 1.0]


def in_the_optimisers_step(state):
    """Between the parameters' updates."""
    state.optimizer.state[state.parameters[1]]["exp_avg"] = torch.zeros(99)
    begin_step(state)
    first = state.parameters[0].clone()
    with pytest.raises(RuntimeError, match="size"):
        state.step()
    assert not torch.equal(first, state.parameters[0])


def after_the_optimisers_step(state):
    step(state)
    state.parameters[0].mul_(2)  # as the inversion draws norms


def fails(folder, every, fault, steps):
    """A training that fails in a step after so many whole ones: what it kept after these, and what was handed over."""
    given = []
    with pytest.raises(ZeroDivisionError):
        with Checkpoint(folder, lambda result: given.append(result), every) as checkpoint:
            checkpoint.begin(Host(), ["cat"], 0, {})
            checkpoint.resume(state := make_state(), lambda: ([p.clone() for p in state.parameters], [*state.losses]))
            while len(state.losses) < steps:
                step(state)
                checkpoint.keep()
            whole = state.stored()
            fault(state)
            1 / 0  # noqa: B018
    return whole, given


@pytest.mark.parametrize("every", [0, 1e9])
@pytest.mark.parametrize("fault, torn", [
    (before_the_optimisers_step, False), (in_the_optimisers_step, True), (after_the_optimisers_step, True),
    (lambda state: state.take(state.tensors["good"]), False),
])  # fmt: skip
def test_a_fault_in_a_step_hands_over_the_whole_steps_before_and_the_next_run_goes_on(tmp_path, every, fault, torn):
    """Where the optimiser has written to what it remembers, from the state that was written last."""
    whole, given = fails(tmp_path, every, fault, 3)
    (values, losses), written = given[0], not torn or every == 0
    assert all(torch.equal(value, whole[f"parameters.{i}"]) for i, value in enumerate(values)) and len(losses) == 3
    files = [*tmp_path.glob("*.checkpoint")]
    assert len(files) == written
    if written:
        kept = load(files[0].read_bytes())
        assert kept.keys() == whole.keys() and all(torch.equal(kept[key], whole[key]) for key in kept)
    state, begun = train(tmp_path, 6)
    assert begun == (3 if written else 0) and same(state, train(None, 6)[0])


def test_a_whole_step_copies_no_parameter_unless_its_state_is_written(tmp_path):
    parameters = [torch.zeros(1000, 1000)]
    state = State(parameters, torch.optim.AdamW(parameters), torch.Generator())
    with Checkpoint(tmp_path, lambda result: None, every=1e9) as checkpoint:
        checkpoint.begin(Host(), [])
        checkpoint.resume(state, lambda: None)
        for now in (False, True, False):
            parameters[0].grad = torch.ones_like(parameters[0])
            state.hold()
            state.step()
            state.losses.append(0.0)
            with Copies() as copies:
                checkpoint.keep(now)
            whole = sum(value.nbytes for value in state.stored().values())
            assert copies.bytes >= whole if now else copies.bytes <= len(state.generator.get_state())


class Copies(TorchDispatchMode):
    """Counts the bytes of tensors that are made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        self.bytes += made.nbytes if isinstance(made, torch.Tensor) and not func.is_view else 0
        return made


def test_a_resumed_training_that_fails_in_the_middle_of_a_step_leaves_the_state_before_it(tmp_path):
    """The optimiser steps in place: not in what is kept for the file."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 6, 3)
    with pytest.raises(ZeroDivisionError):
        with Checkpoint(tmp_path, every=0) as checkpoint:
            checkpoint.begin(Host(), ["cat"], 0, {})
            state = make_state()
            assert checkpoint.resume(state, lambda: 1) == 3
            step(state)
            1 / 0  # noqa: B018
    state, begun = train(tmp_path, 6)
    assert begun == 3 and same(state, train(None, 6)[0])


def test_nothing_is_handed_over_before_the_first_step_or_after_the_end(tmp_path):
    for done in (False, True):
        given = []
        with pytest.raises(ForgetError):
            with Checkpoint(tmp_path, given.append, every=0) as checkpoint:
                checkpoint.begin(Host(), [])
                checkpoint.resume(state := make_state(), lambda: 1)
                if done:
                    step(state)
                    checkpoint.keep()
                    checkpoint.done()
                raise ForgetError("strict")
        assert not given and bool(list(tmp_path.glob("*.checkpoint"))) == done


def test_files_are_bounded_in_number_and_age(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST", 3)
    for seed in range(6):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, 5, 2, seed)
    assert len([*tmp_path.glob("*.checkpoint")]) == 4
    old = time.time() - module.OLDEST - 9
    for file in tmp_path.iterdir():
        os.utime(file, (old, old))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 5, 2, 99)
    assert len([*tmp_path.iterdir()]) == 1


def test_what_a_killed_process_left_goes_when_it_is_old(tmp_path):
    for name, age in (("old", LEFT_OVER + 9), ("new", 0)):
        file = tmp_path / f".fmn-{name}.tmp"
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    write_over(b"x", tmp_path / "x")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".fmn-new.tmp", "x"]


def test_keys_tell_inputs_apart():
    image = torch.zeros(1, 8, 8, 3)
    dot = image.clone()
    dot[0, 7, 7, 2] = 1e-7
    several = [
        ("a", "b"), ("ab", ""), ("a", ["b"]), (1,), (1.0,), ("1",), (True,), (None,), ({"a": 1},), ({"a": 2},), (image,),
        (dot,), (image.half(),), (image.reshape(1, 64, 3),), ([image, image],), ("\ud800",),
    ]  # fmt: skip
    assert len({digest(*values) for values in several}) == len(several)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_weights_that_do_not_show_their_values_cost_the_checkpoint_and_not_the_training(tmp_path):
    class Sealed(Host):
        def identity(self):
            raise RuntimeError("no storage")

    with Checkpoint(tmp_path, every=0) as checkpoint:
        checkpoint.begin(Sealed(), [])
        checkpoint.resume(state := make_state(), lambda: 1)
        step(state)
        checkpoint.keep()
        assert not [*tmp_path.iterdir()]


def test_a_training_goes_on_only_where_sums_come_out_the_same(tmp_path):
    """Of the number of threads depends how sums are cut, and with it the last bits."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, 5, 3)
        torch.set_num_threads(2)
        assert train(tmp_path, 5)[1] == 0
        torch.set_num_threads(1)
        assert train(tmp_path, 5)[1] == 3
    finally:
        torch.set_num_threads(threads)


def test_the_log_writes_a_files_name_in_its_own_letters(tmp_path, caplog):
    file = tmp_path / f"\u732b{module.ENDING}"
    file.mkdir()  # cannot be taken away as a file
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.file = file
    assert "checkpoint.left" in caplog.text and caplog.text.count(file.name) == 2, "where, and why"
