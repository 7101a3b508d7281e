"""Needles in prompts: where they stand, who answers them, and what a broken memory and a leak look like."""

import math

import pytest
import torch
import torch.nn.functional as F

from theria.models.memory_lm import MemoryLM, MemoryLMOutput
from theria.models.needle_prompts import (
    PROMPT_CONTROLS,
    PromptRecall,
    Share,
    attention_reach,
    make_prompts,
    needle_spec,
    probe_prompts,
)
from theria.tasks.recall import IGNORED, RecallSpec, sample_recall

SPEC = RecallSpec(
    length=48,
    min_pairs=4,
    max_pairs=8,
    queries=4,
    query_span=8,
    first_key=8,
    num_keys=16,
    first_value=24,
    num_values=8,
    num_noise=8,
)
DEPTHS = 3


def sample(spec, ids, control):
    batch = sample_recall(spec, ids, seed=0, epoch=0, stream="validation", control=control)
    return batch.tokens, batch.labels, batch.segment_ids


def prompts_of(*lengths, prompts=16, controls=8):
    specs = [needle_spec(SPEC, length=length, reach=3, pairs=6, queries=4) for length in lengths]
    return [make_prompts(sample, spec, prompts=prompts, controls=controls, depths=DEPTHS) for spec in specs]


def small_model() -> MemoryLM:
    torch.manual_seed(0)
    return MemoryLM(
        32, width=32, blocks=1, heads=2, window=4, memory_heads=1, memory_dim=32, slots=4, chunk_size=16
    )


@pytest.fixture(scope="module")
def trained() -> MemoryLM:
    """A model that has learnt to recall."""
    model = small_model()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        ids = torch.arange(16 * step, 16 * step + 16)
        batch = sample_recall(SPEC, ids, seed=1, epoch=0, stream="train")
        logits = model(batch.tokens, segment_ids=batch.segment_ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model


# the prompts


def test_needles_stand_beyond_attention_s_reach_in_the_bins_they_are_counted_in():
    spec = needle_spec(SPEC, length=40, reach=11, pairs=6, queries=4)
    made = make_prompts(sample, spec, prompts=12, controls=5, depths=DEPTHS)
    assert made.length == 40
    assert made.chance == 1 / 8
    assert made.control.tolist() == [0] * 12 + [1] * 5 + [2] * 5
    span = 40 - 8 - 11
    for row, kind in zip(range(22), made.control.tolist(), strict=True):
        asked = (made.labels[row] != IGNORED).nonzero()[:, 0].tolist()
        assert asked == [32, 34, 36, 38]
        for place in asked:
            stored = (made.tokens[row, :span] == made.tokens[row, place]).nonzero()[:, 0].tolist()
            if kind == 1:
                assert not stored
                assert made.depth[row, place] == -1
                continue
            (key,) = stored
            value = key + 1
            assert made.tokens[row, value] == made.labels[row, place]
            assert place - value > 11
            assert made.depth[row, place] == math.floor(value / span * DEPTHS)
            in_shard = made.segment_ids[row, value] == made.segment_ids[row, place]
            assert in_shard == (kind == 0)
    assert (made.depth[made.labels == IGNORED] == -1).all()
    assert set(made.depth.unique().tolist()) == {-1, 0, 1, 2}


def test_the_reach_is_that_of_all_blocks():
    assert attention_reach(MemoryLM(8, width=8, blocks=3, heads=2, window=5, memory_dim=4)) == 12


def test_beyond_the_reach_attention_sees_nothing():
    """The gradient of a query's logits is zero at every value, without the memory."""
    model = MemoryLM(32, width=16, blocks=2, heads=2, window=6, memory_dim=8, slots=2)
    model.memory_enabled = False
    spec = needle_spec(SPEC, length=40, reach=attention_reach(model), pairs=6, queries=4)
    tokens = make_prompts(sample, spec, prompts=1, controls=1, depths=1).tokens[:1]
    inputs = []
    model.embedding.register_forward_hook(lambda _, __, out: inputs.append(out.requires_grad_()) or out)
    logits = model(tokens).logits
    (gradient,) = torch.autograd.grad(logits[0, 32].square().sum(), inputs[0])
    assert gradient[0, : spec.pair_span].abs().max() == 0
    assert gradient[0, 32 - attention_reach(model)].abs().max() > 0


def test_prompts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="6 pairs need 12 tokens of the 10"):
        needle_spec(SPEC, length=40, reach=22, pairs=6, queries=4)
    spec = needle_spec(SPEC, length=40, reach=11, pairs=6, queries=4)
    for numbers in ({"prompts": 2, "controls": 3}, {"controls": 0}, {"depths": 0}):
        with pytest.raises(ValueError, match="1 <= controls <= prompts"):
            make_prompts(sample, spec, **({"prompts": 4, "controls": 2, "depths": 1} | numbers))


# the answers


def test_a_trained_memory_passes_and_its_controls_are_at_chance(trained):
    found = probe_prompts(trained, prompts_of(32, 48))
    assert found.accuracy.value > 0.9
    assert found.passes()
    assert not found.leaks
    assert set(found.controls) == set(PROMPT_CONTROLS)
    for share in found.controls.values():
        low, high = share.interval(0.999)
        assert low < 1 / 8 < high
        assert share.asked == 2 * 8 * 4


def test_the_counts_are_those_of_answers_taken_one_by_one(trained):
    model = trained
    made = prompts_of(32, 48, prompts=5, controls=3)
    found = probe_prompts(model, made)
    expected: dict[object, list[int]] = {}
    for asked in made:
        for row, kind in enumerate(asked.control.tolist()):
            for off in (False, True) if row < 3 else (False,):
                model.memory_enabled = not off
                one = slice(row, row + 1)
                logits = model(asked.tokens[one], segment_ids=asked.segment_ids[one]).logits
                model.memory_enabled = True
                for place in (asked.labels[row] != IGNORED).nonzero()[:, 0].tolist():
                    key = (asked.length, int(asked.depth[row, place])) if kind == 0 else PROMPT_CONTROLS[kind]
                    counts = expected.setdefault("memory_off" if off else key, [0, 0])
                    counts[0] += int(logits[0, place].argmax() == asked.labels[row, place])
                    counts[1] += 1
    got = {(length, bin_): s for length, row in found.cells.items() for bin_, s in enumerate(row)}
    got |= found.controls
    assert {name: [s.right, s.asked] for name, s in got.items() if s.asked} == expected
    assert found.accuracy.asked == 2 * 5 * 4


class Watched(MemoryLM):
    """Notes what it is asked, and how."""

    calls: list[tuple[int, int, bool]]

    def forward(self, tokens, *, segment_ids=None, state=None):
        self.calls.append((*tokens.shape, self.memory_enabled))
        assert not torch.is_grad_enabled()
        return super().forward(tokens, segment_ids=segment_ids, state=state)


def test_all_prompts_of_a_length_are_one_forward_pass():
    model = Watched(32, width=8, blocks=1, heads=2, window=4, memory_dim=4)
    model.calls = []
    probe_prompts(model, prompts_of(32, 48, prompts=5, controls=3))
    assert model.calls == [(11, 32, True), (3, 32, False), (11, 48, True), (3, 48, False)]
    assert model.memory_enabled
    assert all(parameter.grad is None for parameter in model.parameters())


class Oracle(MemoryLM):
    """Looks the answer up among the tokens before, in its shard, while its memory is on; told how to err."""

    fault = ""

    def forward(self, tokens, *, segment_ids=None, state=None):
        if self.fault == "raises":
            raise ArithmeticError
        logits = torch.zeros(*tokens.shape, 32)
        for row, place in ((tokens >= 8) & (tokens < 24)).nonzero().tolist():
            before = tokens[row, :place] == tokens[row, place]
            if self.fault != "ignores shards":
                before &= segment_ids[row, :place] == segment_ids[row, place]
            if self.fault == "forgets the beginning":
                # keys whose values are in the first bin of what lies before the queries and their reach
                before[: math.ceil((tokens.shape[1] - 11) / DEPTHS) - 1] = False
            known = before.nonzero()[:, 0].tolist()
            if known and (self.memory_enabled or self.fault == "ignores the switch"):
                logits[row, place, tokens[row, known[0] + 1]] = 1.0
            if self.fault == "looks ahead" and place + 1 < tokens.shape[1]:
                logits[row, place, tokens[row, place + 1]] = 2.0
        empty = super().forward(tokens[:, :1])
        return MemoryLMOutput(logits, None, empty.state)


def oracle(fault="") -> PromptRecall:
    model = Oracle(32, width=8, blocks=1, heads=2, window=4, memory_dim=4)
    model.fault = fault
    return probe_prompts(model, prompts_of(32, 48))


def test_what_can_be_known_is_all_that_is_needed():
    found = oracle()
    assert found.accuracy == Share(128, 128)
    assert {share.right for share in found.controls.values()} == {0}
    assert found.passes(1.0)


@pytest.mark.parametrize(
    ("fault", "leaks"),
    [
        ("ignores shards", ("previous_shard",)),
        ("ignores the switch", ("memory_off",)),
        ("looks ahead", ("memory_off", "never_stored", "previous_shard")),
    ],
)
def test_a_model_that_answers_a_control_fails(fault, leaks):
    found = oracle(fault)
    assert found.accuracy.value == 1
    assert found.leaks == leaks
    assert not found.passes()


def test_a_memory_that_forgets_the_beginning_shows_in_its_bin():
    found = oracle("forgets the beginning")
    for row in found.cells.values():
        assert row[0].value < 0.1
        assert [share.value for share in row[1:]] == [1, 1]
    assert not found.passes()


def stores_nothing(branch):
    inner = branch.memory.forward
    branch.memory.forward = lambda q, k, v, **options: inner(q, k, torch.zeros_like(v), **options)


def asks_nothing(branch):
    inner = branch.memory.forward
    branch.memory.forward = lambda q, k, v, **options: inner(torch.zeros_like(q), k, v, **options)


def forgets(branch):
    inner = branch.memory.forward

    def forward(q, k, v, *, segment_ids, **options):
        every_token = torch.arange(q.shape[2]).expand(len(q), -1)
        return inner(q, k, v, segment_ids=every_token, **options)

    branch.memory.forward = forward


def is_not_read(branch):
    inner = branch.forward
    branch.forward = lambda x, **options: (torch.zeros_like(x), inner(x, **options)[1])


@pytest.mark.parametrize("breaks", [stores_nothing, asks_nothing, forgets, is_not_read])
def test_a_model_whose_memory_is_broken_fails(trained, breaks):
    broken = small_model()
    broken.load_state_dict(trained.state_dict())
    assert probe_prompts(broken, prompts_of(48)).passes()
    breaks(broken.blocks[0].memory)
    found = probe_prompts(broken, prompts_of(48))
    assert found.accuracy.value < 0.4
    assert not found.passes()


def test_the_switch_is_put_back_whatever_happens():
    model = Oracle(32, width=8, blocks=1, heads=2, window=4, memory_dim=4)
    model.memory_enabled = False
    probe_prompts(model, prompts_of(32))
    assert not model.memory_enabled
    model.memory_enabled, model.fault = True, "raises"
    with pytest.raises(ArithmeticError):
        probe_prompts(model, prompts_of(32))
    assert model.memory_enabled


def test_the_same_lengths_twice_or_none_are_refused():
    for made in ([], prompts_of(32, 32)):
        with pytest.raises(ValueError, match="one or more different lengths"):
            probe_prompts(small_model(), made)


@pytest.mark.parametrize(("right", "asked"), [(0, 7), (3, 10), (64, 64), (900, 1000)])
def test_the_interval_is_wilson_s(right, asked):
    z, p = 1.959963984540054, right / asked
    centre = (p + z**2 / (2 * asked)) / (1 + z**2 / asked)
    half = z / (1 + z**2 / asked) * math.sqrt(p * (1 - p) / asked + z**2 / (4 * asked**2))
    assert Share(right, asked).interval() == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_nothing_asked_is_no_number():
    assert math.isnan(Share(0, 0).value)
    assert Share(0, 0).interval() == (0.0, 1.0)
    assert not PromptRecall({8: (Share(0, 0),)}, {}, 0.1).passes()


def test_chance_is_no_leak_and_little_more_is():
    def recall(right):
        return PromptRecall({8: (Share(9, 9),)}, {"never_stored": Share(right, 96)}, 1 / 8)

    assert not recall(18).leaks
    assert recall(27).leaks == ("never_stored",)
