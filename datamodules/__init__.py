"""Data for training: deterministic, resumable at any batch, shardable over ranks."""

from datamodules.calibration_text import CalibrationText
from datamodules.synthetic_seqcls import SyntheticSeqCls

__all__ = ["CalibrationText", "SyntheticSeqCls"]
