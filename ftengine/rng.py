"""Counter-based random streams: a sample is a function of its address, never of a worker, an order or a restart."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is drawn for; streams of different purposes never overlap. Append only: numbers are part of every result."""

    CASE_ORDER = 1
    CROP_AND_AUGMENT = 2
    TUMOR = 3
    PHANTOM = 4
    ANCHOR = 5
    TEXTURE_FIELD = 6
    INITIALIZATION = 7


def patch_rng(seed: int, purpose: Purpose, *, epoch: int = 0, index: int = 0, draw: int = 0) -> np.random.Generator:
    """Random stream of one patch: Philox keyed by (seed, purpose), counter set by (epoch, index, draw).

    The lowest counter word stays free, so streams hold 2**64 blocks each and cannot run into one another.
    All arguments are non-negative and below 2**64.
    """
    key = np.array([seed, int(purpose)], dtype=np.uint64)
    counter = np.array([0, draw, index, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
