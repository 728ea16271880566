"""Rank training formulations by a study's scores (Table 1)."""

from mmdit.cli.eval.rank import main

if __name__ == "__main__":
    main()
