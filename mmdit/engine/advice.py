"""What messages advise, by the keys of the config section that a loop's settings came from.

The section is `training` for the flow, and for what it stands on that of a stage, as
`autoencoder.training`.
"""

from mmdit.programs import command


def setting(section: str, name: str, value: object) -> str:
    """What to write on the command line to change one of the settings."""
    # The config of a stage names only those that it needs; `++` changes one, or adds it.
    return f"{'++' if _stage(section) else ''}{section}.{name}={value}"


def where_not_finite(section: str) -> str:
    """What to do where losses or gradients are not finite."""
    if stage := _stage(section):
        return f"Lower {stage}.lr: the {stage} is then trained anew"
    return (
        "Lower optimizer.lr and go on from the last checkpoint with resume=auto; where its weights "
        "are ruined already, move it elsewhere, and the one before is used"
    )


def where_memory_ran_out(section: str) -> str:
    """What needs less memory, besides a smaller part of a batch."""
    if _stage(section):
        return "precision=bf16"
    return (
        "activation_checkpointing=full, precision=bf16, or parallel=fsdp on more GPUs; "
        f"`{command('eval/memory')}` tells beforehand what a config needs"
    )


def _stage(section: str) -> str:
    """What a stage is called; empty for the flow."""
    return section.removesuffix("training").rstrip(".")
