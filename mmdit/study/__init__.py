"""The paper's study: its 61 formulations, how they are measured, ranked and reported."""

from mmdit.study.alignment import AlignmentProbe
from mmdit.study.protocol import StudyProtocol
from mmdit.study.word import WordAccuracy

__all__ = [
    "AlignmentProbe",
    "StudyProtocol",
    "WordAccuracy",
]
