"""Lightning callbacks: what is measured, logged, saved and healed while training runs."""

from callbacks.attention_grad_logger import AttentionGradLogger
from callbacks.cuda_memory_stats import CUDAMemoryStats
from callbacks.curvature_probe import CurvatureProbe
from callbacks.dashboard import Dashboard
from callbacks.early_stopping import ResumableEarlyStopping
from callbacks.gate_monitor import GateMonitor, UnhealthyGatesError
from callbacks.inner_step_curves import InnerStepCurves
from callbacks.interference_heatmap import InterferenceHeatmap
from callbacks.learning_rate_search import LearningRateSearch
from callbacks.metrics_jsonl import MetricsJSONL
from callbacks.metrics_reader import read_metrics
from callbacks.niah_probe import NIAHProbe
from callbacks.optimizer_values import ConfiguredOptimizerValues
from callbacks.ppl_delta_rollback import PPLDeltaRollback
from callbacks.progress import StepProgressBar
from callbacks.resumable_checkpoint import ResumableCheckpoint
from callbacks.rng_state import RNGState
from callbacks.run_card import RunCard
from callbacks.throughput_rates import ThroughputRates
from callbacks.unhealthy_training import UnhealthyTrainingError
from callbacks.weight_averaging import ResumableWeightAveraging

__all__ = [
    "AttentionGradLogger",
    "CUDAMemoryStats",
    "ConfiguredOptimizerValues",
    "CurvatureProbe",
    "Dashboard",
    "GateMonitor",
    "InnerStepCurves",
    "InterferenceHeatmap",
    "LearningRateSearch",
    "MetricsJSONL",
    "NIAHProbe",
    "PPLDeltaRollback",
    "RNGState",
    "ResumableCheckpoint",
    "ResumableEarlyStopping",
    "ResumableWeightAveraging",
    "RunCard",
    "StepProgressBar",
    "ThroughputRates",
    "UnhealthyGatesError",
    "UnhealthyTrainingError",
    "read_metrics",
]
