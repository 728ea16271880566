"""How much of its teacher's accuracy a student of few steps keeps: eval/few_steps.py."""

from mmdit.study.curves import Comparison, Mean

FEW_STEPS = Comparison(
    experiment="few_steps probe=student",
    probe="AlignmentProbe",
    figures={
        "accuracy": "accuracy",
        "accuracy_held_out": "accuracy_held_out",
        "accuracy_in_one": "accuracy_other_sampler",
        "diversity": "diversity",
        "pixel_deviation": "pixel_deviation",
    },
    order=("accuracy", "accuracy_in_one"),
    required=("accuracy", "accuracy_in_one", "pixel_deviation"),
    students=True,
)
# What a student should keep of the accuracy of its teacher.
ENOUGH, ENOUGH_IN_ONE = 0.95, 0.8


def kept(mean: Mean, teacher: float) -> Mean:
    """A mean accuracy as a share of the teacher's, whose own error is not counted."""
    return mean._replace(mean=mean.mean / teacher, half_width=mean.half_width / teacher)
