"""Compare models with diffusers and transformers on the same weights and inputs."""

from mmdit.cli.eval.parity import main

if __name__ == "__main__":
    main()
