"""Measure what few sampling steps cost, and the length of paths (Table 6)."""

from mmdit.cli.eval.efficiency import main

if __name__ == "__main__":
    main()
