"""Make averages of any length after training (EDM2, Sec. 3.2)."""

from mmdit.cli.eval.posthoc import main

if __name__ == "__main__":
    main()
