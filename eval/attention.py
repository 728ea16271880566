"""Measure attention logits and entropy, block by block (Figure 5)."""

from mmdit.cli.eval.attention import main

if __name__ == "__main__":
    main()
