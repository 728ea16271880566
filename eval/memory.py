"""Predict or measure the memory that training takes in each process."""

from mmdit.cli.eval.memory import main

if __name__ == "__main__":
    main()
