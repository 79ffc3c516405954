"""The commonest hue of a picture's vivid pixels: what it is seen to be coloured, and what is recoloured."""

import numpy as np

BIN = 8  # of the 256 hues of an HSV image


def commonest_hue(hue, weight):
    """The middle, in 0..256, of the bin where most hues [H, W] of these weights [H, W] lie, neighbours counted half."""
    histogram = np.bincount(hue.ravel().astype(int) // BIN, weight.ravel(), 256 // BIN)
    return BIN * (np.argmax(2 * histogram + np.roll(histogram, 1) + np.roll(histogram, -1)) + 0.5)
