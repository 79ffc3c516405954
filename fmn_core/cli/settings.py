"""The settings of the core as options of the command line."""

from __future__ import annotations

import argparse
import dataclasses

from ..erasure.config import PRESET_HELP, PRESETS, ForgetConfig, TrainingConfig, make_config


def add_settings(parser: argparse.ArgumentParser, settings: type) -> None:
    """One option for each field of a settings dataclass, with its default, choices and help."""
    for f in dataclasses.fields(settings):
        option, help = f"--{f.name.replace('_', '-')}", f.metadata["help"].replace("%", "%%")
        if isinstance(f.default, bool):
            action = argparse.BooleanOptionalAction if f.default else "store_true"
            parser.add_argument(option, action=action, default=f.default, help=help)
        else:
            text = f"{help} (default: {f.default})" if f.default != "" else help
            choices = f.metadata["choices"]
            parser.add_argument(option, type=type(f.default), default=f.default, choices=choices, help=text)


def add_preset_settings(parser: argparse.ArgumentParser) -> None:
    """`--preset`, and one option for each setting of any preset, grouped by the presets that read it."""
    parser.add_argument("--preset", choices=list(PRESETS), default="fast", help=PRESET_HELP.replace("%", "%%"))
    owners: dict[str, list[str]] = {}
    for preset, config in PRESETS.items():
        for f in dataclasses.fields(config):
            owners.setdefault(f.name, []).append(preset)
    groups: dict[str, argparse._ArgumentGroup] = {}
    settings: list[type[ForgetConfig]] = [ForgetConfig, TrainingConfig, *PRESETS.values()]
    for config in settings:
        for f in dataclasses.fields(config):
            if f.name in owners:
                title = "settings of " + (
                    "all presets" if len(owners[f.name]) == len(PRESETS) else ", ".join(owners[f.name])
                )
                if title not in groups:
                    groups[title] = parser.add_argument_group(title)
                add_setting(groups[title], f, owners.pop(f.name))


def add_setting(group, f: dataclasses.Field, presets: list[str]) -> None:
    """An option without a value unless it is given: presets have defaults of their own."""
    option, help = f"--{f.name.replace('_', '-')}", f.metadata["help"].replace("%", "%%")
    if isinstance(f.default, bool):
        group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=help)
        return
    default = f" (default: {f.default})" if f.default != "" and len(presets) != 1 else ""
    choices = f" One of {', '.join(f.metadata['choices'])}." if f.metadata["choices"] else ""
    group.add_argument(option, type=type(f.default), default=None, help=f"{help}{choices}{default}")


def take_config(options: argparse.Namespace) -> ForgetConfig:
    """The preset's settings from parsed options; raises ForgetError for values out of bounds, and for an option that the
    preset does not read."""
    names = dict.fromkeys(f.name for config in PRESETS.values() for f in dataclasses.fields(config))
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return make_config(options.preset, **given)


def take_settings(options: argparse.Namespace, settings: type):
    """The dataclass from parsed options; raises ForgetError for values out of bounds."""
    return settings(**{f.name: getattr(options, f.name) for f in dataclasses.fields(settings)})
