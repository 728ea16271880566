"""Time the models against diffusers and transformers on the same weights."""

from mmdit.cli.eval.speed import main

if __name__ == "__main__":
    main()
