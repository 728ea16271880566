"""Measure what each text encoder contributes (App. B.2, B.3)."""

from mmdit.cli.eval.encoders import main

if __name__ == "__main__":
    main()
