"""Shards are a partition, and a stream goes on exactly where it stopped."""

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from datamodules.loader import BatchIndex, BatchLoader, ResumableLoader, Shard

# Python 3.12 warns of every fork in a process with threads, which PyTorch always is.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Echo(Dataset[Any]):
    """Gives back the index it was asked for, and whether a worker answered."""

    def __getitem__(self, index: BatchIndex) -> tuple[int, list[int], bool]:
        return index.epoch, list(index.ids), get_worker_info() is not None


def stream(epochs: range, num_items: int, batch_size: int) -> list[tuple[int, list[int]]]:
    """What uninterrupted training sees."""
    return [
        (epoch, list(range(first, first + batch_size)))
        for epoch in epochs
        for first in range(0, num_items, batch_size)
    ]


def read(loader: BatchLoader, batches: int | None = None) -> list[tuple[int, list[int]]]:
    """A pass over the loader, or its first batches."""
    seen = []
    for epoch, ids, _ in loader:
        seen.append((epoch, ids))
        if len(seen) == batches:
            break
    return seen


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batches_of", [1, 2, 5])
@pytest.mark.parametrize("num_items", [8, 9, 23, 40, 41])
def test_ranks_share_every_id_of_every_batch_once(world_size: int, batches_of: int, num_items: int) -> None:
    batch_size = batches_of * world_size
    shards = [Shard(num_items, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert max(map(len, shards)) == -(-num_items // batch_size)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    seen: list[int] = []
    for batch in range(max(map(len, shards))):
        shares = [list(shard.ids(batch)) for shard in shards]
        assert [len(share) > 0 for share in shares] == [batch < len(shard) for shard in shards]
        if (batch + 1) * batch_size <= num_items:
            assert {len(share) for share in shares} == {batches_of}
        together = sorted(i for share in shares for i in share)
        assert together == list(range(batch * batch_size, min((batch + 1) * batch_size, num_items)))
        seen += together
    assert seen == list(range(num_items))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0, 1), "num_items must be at least 1, got 0"),
        ((4, 0, 0, 1), "batch_size must be at least 1, got 0"),
        ((4, 4, 0, 0), "world_size must be at least 1, got 0"),
        ((4, 4, 2, 2), r"rank must be in \[0, 1\], got 2"),
        ((12, 6, 0, 4), "batch of 6 does not divide over 4 ranks"),
        ((3, 4, 0, 4), "3 items are too few to give 4 ranks"),
    ],
)
def test_impossible_shards_are_refused(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shard(*arguments)


@forks
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_loader_repeats_epoch_0_and_keeps_a_smaller_last_batch(num_workers: int) -> None:
    loader = BatchLoader(Echo(), Shard(7, 3), num_workers=num_workers)
    assert len(loader) == 3
    for _ in range(2):
        assert list(loader) == [[0, ids, num_workers > 0] for ids in ([0, 1, 2], [3, 4, 5], [6])]


@forks
@pytest.mark.parametrize("num_workers", [0, 2])
def test_passes_of_a_resumable_loader_are_epochs(num_workers: int) -> None:
    loader = ResumableLoader(Echo(), Shard(6, 2), num_workers=num_workers)
    assert [batch for _ in range(3) for batch in read(loader)] == stream(range(3), 6, 2)
    assert len(loader) == 3


@forks
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("played", range(7))
def test_the_position_counts_what_was_handed_out_and_resumes_there(played: int, num_workers: int) -> None:
    first = ResumableLoader(Echo(), Shard(6, 2), num_workers=num_workers)
    seen = read(first) + read(first) if played == 6 else []
    while len(seen) < played:
        seen += read(first, min(3, played - len(seen)))
    state = first.state_dict()
    assert state == {"batches": played, "num_items": 6, "batch_size": 2, "skipped": []}
    second = ResumableLoader(Echo(), Shard(6, 2), num_workers=num_workers)
    made_before_the_restore = iter(second)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert len(second) == 3
    seen += [(epoch, ids) for epoch, ids, _ in made_before_the_restore]
    assert seen == stream(range(4), 6, 2)[: played + 3]


def test_an_iterator_that_is_never_read_moves_nothing() -> None:
    loader = ResumableLoader(Echo(), Shard(6, 2))
    iter(loader)
    assert read(loader) == stream(range(1), 6, 2)


def test_ranks_together_resume_what_one_process_began_and_the_other_way_round() -> None:
    alone = ResumableLoader(Echo(), Shard(8, 4))
    read(alone, 1)
    ranks = [ResumableLoader(Echo(), Shard(8, 4, rank=rank, world_size=2)) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(alone.state_dict())
    seen = [read(rank) for rank in ranks]
    assert seen == [[(0, [4, 6]), (1, [0, 2])], [(0, [5, 7]), (1, [1, 3])]]
    alone.load_state_dict(ranks[1].state_dict())
    assert read(alone, 1) == [(1, [4, 5, 6, 7])]


@pytest.mark.parametrize("sizes", [(12, 2), (6, 3), (6, 1)])
def test_other_sizes_are_refused_in_the_middle_of_an_epoch_and_taken_between_two(
    sizes: tuple[int, int],
) -> None:
    loader = ResumableLoader(Echo(), Shard(6, 2))
    read(loader)
    between = loader.state_dict()
    read(loader, 1)
    other = ResumableLoader(Echo(), Shard(*sizes))
    with pytest.raises(
        ValueError, match=f"1 batches into an epoch of 6 items in batches of 2.*{sizes[0]} items"
    ):
        other.load_state_dict(loader.state_dict())
    other.load_state_dict(between)
    assert read(other) == stream(range(1, 2), *sizes)


def test_an_epoch_of_partial_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="full batches, got 7 items in batches of 2"):
        ResumableLoader(Echo(), Shard(7, 2))


@forks
@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_random_state_alone(num_workers: int) -> None:
    state = torch.random.get_rng_state()
    read(ResumableLoader(Echo(), Shard(6, 2), num_workers=num_workers))
    assert torch.equal(torch.random.get_rng_state(), state)


@forks
@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_batches_are_passed_over_and_all_others_stay_what_they_are(num_workers: int) -> None:
    loader = ResumableLoader(Echo(), Shard(6, 2), num_workers=num_workers)
    for batches in (range(4, 6), range(1, 2), range(5, 8), range(9, 9)):
        loader.skip(batches)
    assert loader.skipped == [range(1, 2), range(4, 8)]
    numbers = [0, 2, 3, 8, 9, 10]
    whole = stream(range(4), 6, 2)
    assert read(loader) + read(loader) == [whole[number] for number in numbers]
    assert loader.last_batch == 10


@forks
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_skipped_is_part_of_the_state(num_workers: int) -> None:
    first = ResumableLoader(Echo(), Shard(6, 2), num_workers=num_workers)
    first.skip(range(1, 4))
    seen = read(first, 2)
    state = first.state_dict()
    assert state == {"batches": 5, "num_items": 6, "batch_size": 2, "skipped": [[1, 4]]}
    first.skip(range(5, 6))
    assert first.state_dict()["skipped"] == [[1, 4], [5, 6]]
    second = ResumableLoader(Echo(), Shard(6, 2), num_workers=num_workers)
    second.skip(range(100))
    second.load_state_dict(state)
    assert second.skipped == [range(1, 4)]
    whole = stream(range(4), 6, 2)
    assert seen + read(second) == [whole[number] for number in (0, 4, 5, 6, 7)]
    second.load_state_dict({"batches": 0, "num_items": 6, "batch_size": 2})
    assert second.skipped == []
    other = ResumableLoader(Echo(), Shard(6, 3), num_workers=num_workers)
    other.load_state_dict(state | {"batches": 3})
    assert other.skipped == []


@forks
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pass_goes_on_where_the_position_is_put_in_its_middle(num_workers: int) -> None:
    """As a rollback does: back to a state, and past the batches that were at fault."""
    loader = ResumableLoader(Echo(), Shard(20, 2), num_workers=num_workers)
    whole = stream(range(2), 20, 2)
    reading = iter(loader)
    before = [next(reading)[:2] for _ in range(3)]
    state = loader.state_dict()
    failed = [next(reading)[:2] for _ in range(3)]
    assert loader.last_batch == 5
    loader.load_state_dict(state)
    loader.skip(range(loader.state_dict()["batches"] + 1, 7))
    after = [batch[:2] for batch in reading]
    assert [tuple(batch) for batch in before + failed] == whole[:6]
    assert [tuple(batch) for batch in after] == [whole[number] for number in (3, 7, 8, 9)]
    assert loader.state_dict()["batches"] == 10


def test_a_pass_heeds_a_skip_or_a_restore_alone_at_once() -> None:
    whole = stream(range(2), 20, 2)
    skipping, restored = (ResumableLoader(Echo(), Shard(20, 2)) for _ in range(2))
    state = restored.state_dict()
    for loader, change, numbers in (
        (skipping, lambda: skipping.skip(range(3, 9)), [0, 1, 2, 9]),
        (restored, lambda: restored.load_state_dict(state), [0, 1, 0, 1]),
    ):
        reading = iter(loader)
        seen = [next(reading)[:2] for _ in range(2)]
        change()
        seen += [next(reading)[:2] for _ in range(2)]
        assert [tuple(batch) for batch in seen] == [whole[number] for number in numbers]


def test_ranges_with_gaps_are_not_skipped() -> None:
    loader = ResumableLoader(Echo(), Shard(6, 2))
    for wrong in (range(0, 4, 2), range(-1, 2)):
        with pytest.raises(ValueError, match="consecutive numbers from 0 on"):
            loader.skip(wrong)
