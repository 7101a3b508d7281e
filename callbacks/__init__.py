"""Lightning callbacks: what is measured, logged, saved and healed while training runs."""

from callbacks.attention_grad_logger import AttentionGradLogger
from callbacks.cuda_memory_stats import CUDAMemoryStats
from callbacks.metrics_jsonl import MetricsJSONL
from callbacks.metrics_reader import read_metrics

__all__ = ["AttentionGradLogger", "CUDAMemoryStats", "MetricsJSONL", "read_metrics"]
