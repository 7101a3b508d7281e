"""The grid, its keys and its shards."""

import dataclasses

import pytest

from experiments.operator_sensitivity.runs import Run, from_fields, grid, parse_shard, shard


def test_the_defaults_are_the_frozen_configuration():
    runs = grid(Run(), backends=("reference", "triton_fused"))
    assert len(runs) == 48
    assert {r.inner_steps for r in runs} == {1, 5, 10, 20}
    assert {r.mode for r in runs} == {"FULL", "FO", "FO_STRICT"}
    assert {r.seed for r in runs} == {0, 1}
    frozen = (500, 16, 0.4, 1e-3, 32, 64, 5, 4, 1.0, 16, 16)
    names = "outer_steps meta_batch inner_lr outer_lr seq_len width num_classes num_signal_positions noise"
    names += " support_size query_size"
    assert {tuple(getattr(r, name) for name in names.split()) for r in runs} == {frozen}
    assert [r.backend for r in runs] == ["reference"] * 24 + ["triton_fused"] * 24


def test_every_field_is_part_of_the_key():
    base = Run()
    others = [dataclasses.replace(base, **{f.name: _other(f.default)}) for f in dataclasses.fields(Run)]
    assert len({run.run_id for run in (base, *others)}) == len(others) + 1
    assert Run().run_id == base.run_id


def _other(value: object) -> object:
    return not value if isinstance(value, bool) else value + "x" if isinstance(value, str) else value + 1


def test_shards_share_the_runs_out():
    runs = grid(Run())
    parts = [shard(runs, i, 5) for i in range(5)]
    assert sorted(r.run_id for part in parts for r in part) == sorted(r.run_id for r in runs)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match="0/5 to 4/5"):
        shard(runs, 5, 5)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("seeds", [1, 2, 8])
def test_every_shard_has_its_share_of_every_depth(count, seeds):
    runs = grid(Run(), backends=("reference", "triton_fused"), seeds=range(seeds))
    parts = [shard(runs, i, count) for i in range(count)]
    alike = [("inner_steps", "backend"), ("inner_steps", "backend", "mode"), ("backend",), ()]
    for names in alike:
        for kind in {tuple(getattr(run, name) for name in names) for run in runs}:
            shares = [sum(tuple(getattr(r, name) for name in names) == kind for r in part) for part in parts]
            assert max(shares) - min(shares) <= 1, (kind, shares)
    for part in parts:
        assert part == sorted(part, key=runs.index)


@pytest.mark.parametrize("text", ["1", "2/2", "-1/2", "a/b", "0/0", "1/"])
def test_a_shard_that_there_is_not_is_refused(text):
    with pytest.raises(ValueError, match="i/n"):
        parse_shard(text)


def test_a_shard_is_read():
    assert parse_shard("1/4") == (1, 4)


def test_a_run_comes_back_from_a_table(made):
    row = made.table([made.row(made.TINY, 0.5)]).iloc[0]
    assert from_fields({f.name: row[f.name] for f in dataclasses.fields(Run)}) == made.TINY
