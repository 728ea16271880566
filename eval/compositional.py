"""Measure accuracy on GenEval's six tasks, judged from the pixels."""

from mmdit.cli.eval.compositional import main

if __name__ == "__main__":
    main()
