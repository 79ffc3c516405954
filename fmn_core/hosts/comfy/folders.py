"""Where ComfyUI keeps what the pack writes."""

from __future__ import annotations

from pathlib import Path

import folder_paths


def checkpoints_folder() -> Path:
    """For the states of trainings: among the host's own files of users, neither served nor cleared at its start."""
    return Path(folder_paths.get_system_user_directory("forget_me_not"), "checkpoints")


def cache_folder() -> Path:
    """For what only saves time, beside the states of trainings."""
    return Path(folder_paths.get_system_user_directory("forget_me_not"), "cache")


def written_folders() -> dict[str, Path]:
    """What for -> the folder that the pack writes into."""
    return {
        "patches": Path(folder_paths.get_output_directory(), "loras"),
        "learned words": Path(folder_paths.get_folder_paths("embeddings")[0]),
        "checkpoints": checkpoints_folder(),
        "cache": cache_folder(),
    }
