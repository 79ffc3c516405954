"""Recording attention on a model that torch has compiled, before it was recorded or after."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("sampled_before", [False, True])
def test_a_compiled_model_is_recorded_as_the_model_itself(loaded, record, sample, sampled_before):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    text = "a neon drawing of a cat"
    watched, expected = record(text)
    picture = sample(watched, text, steps=2, batch=1)
    model = loaded[0].clone()
    set_torch_compile_wrapper(model=model, backend=lambda graph, inputs: graph.forward)
    if sampled_before:
        sample(model, text, steps=2, batch=1)
    watched, recording = record(text, model)
    torch.testing.assert_close(sample(watched, text, steps=2, batch=1), picture)
    assert recording.layers == expected.layers and recording.layers
    for layer in recording.layers:
        torch.testing.assert_close(recording.map(layer), expected.map(layer))
    torch._dynamo.reset()
