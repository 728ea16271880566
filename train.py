"""Train a text-to-image model: `python train.py`, see `python train.py --help`."""

from mmdit.cli.train import main

if __name__ == "__main__":
    main()
