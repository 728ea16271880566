"""Generate images with a trained model or public weights: see `python sample.py --help`."""

from mmdit.cli.sample import main

if __name__ == "__main__":
    main()
