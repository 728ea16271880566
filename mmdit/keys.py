"""Random numbers by key: each draw depends only on its key.

A generator made from `(seed, step, sample index)` gives the same values in any process, in any
batch and after any number of restarts. So a run has no generator state to save when it stops, or
to restore when it is resumed.
"""

import hashlib

import torch


def generator_for(*key: int | str) -> torch.Generator:
    """CPU generator for a key, e.g. `generator_for(seed, "noise", step, index)`.

    Different keys share a stream only if their hashes collide in the low 32 bits, which are all
    that torch's CPU generator reads.
    """
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
