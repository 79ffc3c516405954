import contextlib

import torch
from standin import strict

cpu = device = torch.device("cpu")
dtype = dtype_unet = dtype_vae = dtype_inference = torch.float32


def autocast(disable=False):
    return contextlib.nullcontext()


def without_autocast(disable=False):
    return contextlib.nullcontext()


def torch_gc():
    pass


strict(__name__)
