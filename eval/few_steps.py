"""Compare students of few steps with their teacher, over recipes and compute."""

from mmdit.cli.eval.few_steps import main

if __name__ == "__main__":
    main()
