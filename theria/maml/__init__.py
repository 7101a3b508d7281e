"""Model-agnostic meta-learning with the tasks of a meta-batch as a tensor dimension.

``meta_gradient`` is the one entry point for training and ``adaptation_curve`` the one for evaluation.
"""

from theria.maml.evaluation import AdaptationCurve, adaptation_curve
from theria.maml.meta_gradient import MetaGradient, check_options, meta_gradient
from theria.maml.modes import MetaMode, Strategy
from theria.maml.task_model import TaskModel

__all__ = [
    "AdaptationCurve",
    "MetaGradient",
    "MetaMode",
    "Strategy",
    "TaskModel",
    "adaptation_curve",
    "check_options",
    "meta_gradient",
]
