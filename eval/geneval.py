"""Generate GenEval's prompts in the layout of its official evaluator (Table 5)."""

from mmdit.cli.eval.geneval import main

if __name__ == "__main__":
    main()
