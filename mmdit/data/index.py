"""Index tar shards before a run starts: `python -m mmdit.data.index shards`.

A run creates missing indices itself (`mmdit.data.shard_index`); this command creates them ahead of
time, for example on a machine without a GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmdit.data.bad_images import report_bad
from mmdit.data.commands import add_options, command
from mmdit.data.patterns import find, find_shards
from mmdit.data.shard_index import index_shards
from mmdit.printable import show


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command described in the module's docstring. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mmdit.data.index", description="Index tar shards of captioned images."
    )
    parser.add_argument("root", type=Path, help="folder of tar shards")
    parser.add_argument(
        "--shards", help="pattern such as cc12m-{000000..000009}.tar (default: *.tar)"
    )
    parser.add_argument(
        "--index", type=Path, help="folder for indices (default: beside the shards)"
    )
    parser.add_argument("--report", type=Path, help="JSON file that lists the images set aside")
    add_options(parser)
    given = parser.parse_args(arguments)

    def body() -> None:
        bad, usable = dict[str, str](), 0
        for name, index in index_shards(
            find(given.root, given.shards) if given.shards else find_shards(given.root),
            root=given.root,
            folder=given.index,
            max_pixels=given.max_pixels,
            threads=given.threads,
        ):
            bad.update({f"{name}/{key}": reason for key, reason in index.bad.items()})
            usable += len(index.samples)
        report_bad(
            bad,
            files=usable + len(bad),
            place=given.root,
            report=given.report,
            limit=given.max_bad_fraction,
        )
        show(f"{usable} images: train with data=shards data.root={given.root}")

    return command(body)


if __name__ == "__main__":
    sys.exit(main())
