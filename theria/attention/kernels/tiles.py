"""How large a tile of the score matrix each kernel takes, by dtype, width and device generation."""

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps of a program, and tiles in flight (Triton's ``num_stages``)."""

    queries: int
    keys: int
    warps: int
    stages: int

    def within(self, queries: int, keys: int) -> "Tiles":
        """No larger than the sequences need; a matrix product takes at least 16 rows."""
        rows = min(self.queries, _power_of_two(queries))
        columns = min(self.keys, _power_of_two(keys))
        warps = min(self.warps, 4) if rows * columns < self.queries * self.keys else self.warps
        return Tiles(rows, columns, warps, self.stages)


INTERPRETER = Tiles(32, 32, 1, 1)
"""Programs are slow there and memory is plain: few and not large."""

SAFE = {
    (2, 64): Tiles(64, 32, 4, 2),
    (2, 128): Tiles(32, 32, 4, 2),
    (2, 256): Tiles(32, 16, 4, 1),
    (4, 64): Tiles(32, 32, 4, 1),
    (4, 128): Tiles(16, 16, 4, 1),
    (4, 256): Tiles(16, 16, 4, 1),
}
"""By (bytes an element, width): what runs on any device that Triton knows."""

TUNED = {
    ("hopper", "half", 64): {
        "forward_rows": Tiles(64, 64, 4, 3),
        "vjp_rows": Tiles(64, 64, 4, 3),
        "vjp_columns": Tiles(64, 64, 4, 1),
        "jvp_rows": Tiles(64, 64, 4, 3),
        "hvp_rows": Tiles(64, 64, 4, 2),
        "hvp_columns": Tiles(64, 64, 4, 1),
        "second_jvp_rows": Tiles(128, 64, 8, 2),
    },
    ("hopper", "half", 128): {
        "forward_rows": Tiles(64, 64, 4, 2),
        "vjp_rows": Tiles(64, 64, 4, 2),
        "vjp_columns": Tiles(64, 64, 4, 2),
        "jvp_rows": Tiles(128, 64, 8, 2),
        "hvp_rows": Tiles(128, 64, 8, 2),
        "hvp_columns": Tiles(32, 128, 8, 2),
        "second_jvp_rows": Tiles(128, 32, 8, 2),
    },
    ("hopper", "half", 256): {
        "forward_rows": Tiles(64, 64, 4, 2),
        "vjp_rows": Tiles(64, 64, 4, 2),
        "vjp_columns": Tiles(64, 64, 8, 1),
        "jvp_rows": Tiles(128, 32, 8, 1),
        "hvp_rows": Tiles(64, 32, 4, 2),
        "hvp_columns": Tiles(32, 32, 4, 1),
        "second_jvp_rows": Tiles(128, 16, 8, 1),
    },
    ("hopper", "ieee", 64): {
        "forward_rows": Tiles(64, 64, 4, 1),
        "vjp_rows": Tiles(128, 64, 8, 1),
        "vjp_columns": Tiles(64, 64, 4, 1),
        "jvp_rows": Tiles(128, 32, 8, 1),
        "hvp_rows": Tiles(128, 32, 8, 1),
        "hvp_columns": Tiles(32, 128, 8, 1),
        "second_jvp_rows": Tiles(128, 64, 8, 1),
    },
    ("hopper", "ieee", 128): {
        "forward_rows": Tiles(64, 64, 4, 1),
        "vjp_rows": Tiles(128, 32, 8, 1),
        "vjp_columns": Tiles(32, 128, 8, 1),
        "jvp_rows": Tiles(128, 32, 8, 1),
        "hvp_rows": Tiles(64, 32, 4, 1),
        "hvp_columns": Tiles(16, 64, 4, 1),
        "second_jvp_rows": Tiles(64, 16, 4, 1),
    },
    ("hopper", "fma", 64): {
        "forward_rows": Tiles(32, 64, 4, 1),
        "vjp_rows": Tiles(32, 64, 4, 1),
        "vjp_columns": Tiles(32, 32, 4, 2),
        "jvp_rows": Tiles(16, 64, 4, 1),
        "hvp_rows": Tiles(16, 16, 4, 1),
        "hvp_columns": Tiles(64, 16, 4, 1),
        "second_jvp_rows": Tiles(16, 16, 4, 1),
    },
    ("hopper", "tf32x3", 64): {
        "forward_rows": Tiles(128, 64, 8, 1),
        "vjp_rows": Tiles(128, 64, 8, 1),
        "vjp_columns": Tiles(64, 128, 8, 1),
        "jvp_rows": Tiles(128, 64, 8, 1),
        "hvp_rows": Tiles(128, 32, 8, 1),
        "hvp_columns": Tiles(64, 32, 4, 1),
        "second_jvp_rows": Tiles(64, 32, 4, 1),
    },
    ("hopper", "tf32x3", 128): {
        "forward_rows": Tiles(32, 32, 4, 1),
        "vjp_rows": Tiles(32, 32, 4, 1),
        "vjp_columns": Tiles(32, 32, 4, 1),
        "jvp_rows": Tiles(64, 32, 4, 1),
        "hvp_rows": Tiles(64, 16, 4, 1),
        "hvp_columns": Tiles(32, 32, 4, 1),
        "second_jvp_rows": Tiles(64, 16, 4, 1),
    },
    ("hopper", "bf16x6", 64): {
        "forward_rows": Tiles(64, 64, 4, 1),
        "vjp_rows": Tiles(64, 64, 4, 1),
        "vjp_columns": Tiles(32, 64, 4, 1),
        "jvp_rows": Tiles(64, 64, 4, 1),
        "hvp_rows": Tiles(128, 64, 8, 1),
        "hvp_columns": Tiles(32, 128, 8, 1),
        "second_jvp_rows": Tiles(64, 32, 4, 1),
    },
    ("hopper", "bf16x6", 128): {
        "forward_rows": Tiles(64, 32, 4, 1),
        "vjp_rows": Tiles(128, 32, 8, 1),
        "vjp_columns": Tiles(32, 32, 4, 1),
        "jvp_rows": Tiles(128, 32, 8, 1),
        "hvp_rows": Tiles(64, 32, 4, 1),
        "hvp_columns": Tiles(32, 32, 4, 1),
        "second_jvp_rows": Tiles(64, 16, 4, 1),
    },
}
"""By (device generation, arithmetic, width), then by kernel: the fastest that `benchmarks.tune_attention`
found, or one within a few percent of it that compiles in half the time. Those of ``second_jvp_rows`` are
tuned for half precision up to width 128 and for ieee at 64; elsewhere they fit by the compiler's account."""


def tiles_for(kernel: str, dtype: torch.dtype, precision: str, width: int, device: torch.device) -> Tiles:
    """The tuned tiles of a kernel on a device, or safe ones for a device or width that has none.

    Args:
        kernel: a name of `theria.attention.triton_fused.launches`.
        dtype: of query, key and value.
        precision: of float32 products, one of `theria.attention.triton_fused.PRECISIONS`.
        width: the larger of dim and value_dim.
        device: that it runs on; on the CPU it is the interpreter.
    """
    if device.type == "cpu":
        return INTERPRETER
    bucket = max(64, _power_of_two(width))
    taken = precision if dtype == torch.float32 else "half"
    tuned = TUNED.get((generation(device), taken, bucket), {})
    return tuned.get(kernel, SAFE[dtype.itemsize, bucket])


def arithmetic(precision: str, device: torch.device) -> str:
    """How float32 products are taken for a precision: "ieee" by fused multiply-adds but on Hopper."""
    if precision == "ieee" and device.type == "cuda" and generation(device) != "hopper":
        return "fma"
    return precision


def generation(device: torch.device) -> str:
    """The device's family, within which one table of tiles serves."""
    if torch.version.hip is not None:
        return "amd"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "ampere", 9: "hopper", 10: "blackwell"}.get(major, f"sm_{major}x")


def _power_of_two(length: int) -> int:
    """The least power of two that is not smaller, and at least 16."""
    return max(16, 1 << (length - 1).bit_length()) if length > 0 else 16
