"""Model-agnostic meta-learning with the tasks of a meta-batch as a tensor dimension.

``meta_gradient`` is the one entry point for training, ``adaptation_curve`` the one for evaluation, and
``CapturedMetaGradient`` replays the first of them as a CUDA graph.
"""

from theria.maml.capture import CapturedMetaGradient
from theria.maml.evaluation import AdaptationCurve, adaptation_curve
from theria.maml.meta_gradient import MetaGradient, meta_gradient
from theria.maml.modes import MetaMode, Strategy
from theria.maml.task_model import TaskModel

__all__ = [
    "AdaptationCurve",
    "CapturedMetaGradient",
    "MetaGradient",
    "MetaMode",
    "Strategy",
    "TaskModel",
    "adaptation_curve",
    "meta_gradient",
]
