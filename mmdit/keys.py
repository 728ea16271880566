"""Randomness by key: what a sample draws depends on its key alone.

A generator made from `(seed, step, sample index)` gives the same draw in any process, in any batch,
after any number of restarts. So a run carries no generator state, and resuming needs none.
"""

import hashlib

import torch


def generator_for(*key: int | str) -> torch.Generator:
    """CPU generator of the given key, e.g. `generator_for(seed, "noise", step, index)`.

    Keys of different content share a stream only by a collision of hashes, of which torch's CPU
    generator reads the low 32 bits.
    """
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
