"""Measure what finetuning taught and what it cost, over recipes and steps."""

from mmdit.cli.eval.forgetting import main

if __name__ == "__main__":
    main()
