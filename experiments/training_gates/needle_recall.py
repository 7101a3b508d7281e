"""G2-5: what the trained memory gives back, as a memory and in the model's answers."""

from callbacks.niah_result import NIAHResult
from experiments.training_gates.gate import Gate

PAIRS = 100
THRESHOLD = 0.8


def needle_gate(found: NIAHResult) -> Gate:
    """Whether a needle among 100 pairs is read back, prompts are answered, and the controls are at chance."""
    bar = (
        f"cosine in the worst head and share of right answers at least {THRESHOLD:g}, a key never stored at "
        "0 and the controls at chance within intervals of 99.9%"
    )
    level = next((recall for recall in found.capacity if recall.pairs == PAIRS), None)
    prompts = found.prompts
    if level is None or prompts is None:
        missing = f"no needle among {PAIRS} pairs" if level is None else "no prompts"
        return Gate("G2-5", f"the configured probe has {missing}", bar, False)
    said = [
        f"cosine {level.cosine.value:.3f} [{level.cosine.low:.3f}, {level.cosine.high:.3f}] among {PAIRS} "
        f"pairs, {level.worst:.3f} in the worst head (theory of the rule {level.theory:.3f}), never stored "
        f"{level.never_stored.value:+.3f}"
    ]
    low, high = prompts.accuracy.interval()
    said.append(
        f"answers beyond attention's reach {prompts.accuracy.value:.3f} [{low:.3f}, {high:.3f}] of "
        f"{prompts.accuracy.asked}, chance {prompts.chance:.3f}"
    )
    said += [
        f"{name.replace('_', ' ')} {share.right} of {share.asked}" for name, share in prompts.controls.items()
    ]
    return Gate("G2-5", ", ".join(said), bar, level.passes(THRESHOLD) and prompts.passes(THRESHOLD))
