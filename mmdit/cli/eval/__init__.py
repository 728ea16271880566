"""Evaluations: `mmdit-eval <name> key=value ...` runs the module of that name."""

import sys
from importlib import import_module

SCRIPTS = {
    "alignment": "Measure what post-training gained and what it cost, over recipes and compute",
    "attention": "Measure attention logits and entropy, block by block (Figure 5)",
    "autoencoder": "Measure how well an autoencoder reconstructs images (Table 3)",
    "compositional": "Measure accuracy on GenEval's six tasks, judged from the pixels",
    "efficiency": "Measure what few sampling steps cost, and the length of paths (Table 6)",
    "encoders": "Measure what each text encoder contributes (App. B.2, B.3)",
    "few_steps": "Compare students of few steps with their teacher, over recipes and compute",
    "forgetting": "Measure what finetuning taught and what it cost, over recipes and steps",
    "geneval": "Generate GenEval's prompts in the layout of its official evaluator (Table 5)",
    "memory": "Predict or measure the memory that training takes in each process",
    "parity": "Compare models with diffusers and transformers on the same weights and inputs",
    "posthoc": "Make averages of any length after training (EDM2, Sec. 3.2)",
    "rank": "Rank training formulations by a study's scores (Table 1)",
    "speed": "Time the models against diffusers and transformers on the same weights",
}


def main() -> None:
    """Run the evaluation named by the first word of the command line."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in SCRIPTS:
        sys.argv[:2] = [f"{sys.argv[0]} {name}"]
        import_module(f"mmdit.cli.eval.{name}").main()
        return
    lines = ["usage: mmdit-eval <name> [key=value ...]", ""]
    lines += [f"  {script:14} {purpose}" for script, purpose in SCRIPTS.items()]
    if name in ("--help", "-h"):
        print("\n".join([*lines, "", "mmdit-eval <name> --help lists the keys of one."]))
        return
    print("\n".join([f"there is no evaluation {name!r}", "", *lines]), file=sys.stderr)
    sys.exit(2)
