"""Settings for tests that go over the presets."""

from __future__ import annotations

import dataclasses

from fmn_core.erasure.config import PRESETS, ForgetConfig, make_config


def config_for(preset: str, **values: object) -> ForgetConfig:
    """The preset's settings of these values, less those that it does not read."""
    known = {f.name for f in dataclasses.fields(PRESETS[preset])}
    return make_config(preset, **{name: value for name, value in values.items() if name in known})
