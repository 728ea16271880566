"""Measure how well an autoencoder reconstructs images (Table 3)."""

from mmdit.cli.eval.autoencoder import main

if __name__ == "__main__":
    main()
