"""Measure what post-training gained and what it cost, over recipes and compute."""

from mmdit.cli.eval.alignment import main

if __name__ == "__main__":
    main()
