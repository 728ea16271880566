"""One of several processes of `torchrun` that open a folder: counts what each of them decodes.

python opening_process.py <folder of images> <folder of counts>
"""

import json
import sys
from pathlib import Path

import torch

from mmdit.data.caption_sources import Sidecars
from mmdit.data.folder import image_folder
from mmdit.data.images import Pillow
from mmdit.processes import join, leave

photos, out = map(Path, sys.argv[1:])
decoded = 0
opened_by_pillow = Pillow.open


def counted(*arguments, **options):
    global decoded
    decoded += 1
    return opened_by_pillow(*arguments, **options)


Pillow.open = counted
processes = join(torch.device("cpu"), timeout=60)
data = processes.once(
    lambda: image_folder(root=str(photos), captions=Sidecars(), image_size=32, crop="centre")
)
facts = {
    "decoded": decoded,
    "fingerprint": data.fingerprint(),
    "names": [*data.names, *data.view("validation").names],
    "order": data.order(batch_size=2, seed=0)(0, 20),
}
(out / f"{processes.rank}.json").write_text(json.dumps(facts))
leave()
