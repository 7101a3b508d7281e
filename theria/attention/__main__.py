"""Which attention backends there are, what each takes, and which one ``auto`` picks here.

python -m theria.attention --describe
"""

import argparse
import platform

import torch

from theria.attention.call import AttentionCall
from theria.attention.registry import AUTO, available_backends, refusal, select_backend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WIDTHS = (64, 256, 320)


def example_call(device: str, dtype: torch.dtype, width: int) -> AttentionCall:
    """Causal attention over two heads of a thousand positions."""
    shape = (1, 2, 1000, width)
    return AttentionCall(
        query_shape=shape,
        key_shape=shape,
        value_shape=shape,
        dtype=dtype,
        device=torch.device(device),
        is_causal=True,
        window=None,
        causal_alignment="upper_left",
        scale=width**-0.5,
        enable_gqa=False,
    )


def describe() -> str:
    """The report, as text."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    lines = [f"torch {torch.__version__}, Python {platform.python_version()}, {where}", ""]
    for name in available_backends():
        reasons: dict[str, list[str]] = {}
        for device in devices:
            for dtype in _DTYPES:
                for width in _WIDTHS:
                    answer = refusal(name, example_call(device, dtype, width)) or "takes"
                    reasons.setdefault(answer, []).append(f"{device} {_short(dtype)} E={width}")
        lines.append(name)
        lines += [f"  {answer}: {', '.join(calls)}" for answer, calls in reasons.items()]
    lines += ["", f"{AUTO} picks"]
    for device in devices:
        for dtype in _DTYPES:
            picked = {width: select_backend(example_call(device, dtype, width), AUTO) for width in _WIDTHS}
            choice = ", ".join(f"E={width}: {name}" for width, name in picked.items())
            lines.append(f"  {device} {_short(dtype):9} {choice}")
    return "\n".join(lines)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m theria.attention", description=__doc__)
    parser.add_argument("--describe", action="store_true", required=True, help="print the report")
    parser.parse_args()
    print(describe())


if __name__ == "__main__":
    main()
