"""ComfyUI's way to the device without hardware: with this folder and the one above on PYTHONPATH, `--directml` starts on it,
and without float64 where FMN_WITHOUT_FLOAT64 is set."""

import os

import torch
from second_device import NAME, register

if reason := register(double="FMN_WITHOUT_FLOAT64" not in os.environ):
    raise ImportError(reason)


def device(index=0):
    return torch.device(NAME, 0)


def device_name(index=0):
    return "a device without hardware"


def default_device():
    return 0
