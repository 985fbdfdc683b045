import random
from collections import Counter

import pytest

from omninft.prompts.sampler import GroupSampler
from omninft.types import OmniNFTError, Prompt


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{n}", f"v{n}", f"a{n}", f"v{n} a{n}") for n in range(count)]


def ids(sampler: GroupSampler, iteration: int) -> list[str]:
    return [group.prompt.id for group in sampler.groups(iteration)]


# Below, at and above 2P - 1, where the repair of an epoch's head changes from a chain to a local one.
SIZES = [
    (1, 1),
    (2, 1),
    (4, 3),
    (8, 5),
    (4, 4),
    (5, 4),
    (6, 4),
    (7, 4),
    (8, 4),
    (9, 4),
    (23, 7),
    (13, 12),
    (17, 12),
    (40, 3),
]


@pytest.mark.parametrize(("count", "per_iteration"), SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_prompt_once_an_epoch_and_never_twice_an_iteration(count: int, per_iteration: int, seed: int) -> None:
    sampler = GroupSampler(prompts(count), per_iteration, 2, seed)
    iterations = [ids(sampler, iteration) for iteration in range(5 * count)]
    for number, chosen in enumerate(iterations):
        assert len(set(chosen)) == per_iteration, f"iteration {number} repeats a prompt: {chosen}"
    sequence = [prompt_id for chosen in iterations for prompt_id in chosen]
    everything = {f"p{n}" for n in range(count)}
    epochs = [sequence[begin : begin + count] for begin in range(0, len(sequence), count)]
    assert len(epochs) == 5 * per_iteration
    assert all(set(epoch) == everything for epoch in epochs)


def test_groups_are_a_pure_function_of_seed_and_iteration() -> None:
    order = list(range(60))
    random.Random(3).shuffle(order)
    rows = prompts(9)
    straight = [GroupSampler(rows, 7, 3, 5).groups(iteration) for iteration in range(60)]
    once = GroupSampler(rows, 7, 3, 5)
    assert {i: once.groups(i) for i in order} == dict(enumerate(straight))
    assert [ids(GroupSampler(rows[::-1], 7, 3, 5), i) for i in range(60)] == [ids(once, i) for i in range(60)]


def test_pinned_order() -> None:
    sampler = GroupSampler(prompts(5), 3, 2, 0)
    assert [ids(sampler, i) for i in range(4)] == [
        ["p1", "p3", "p0"],
        ["p2", "p4", "p0"],
        ["p4", "p2", "p3"],
        ["p1", "p2", "p4"],
    ]


def test_seed_and_epoch_change_the_order() -> None:
    first, second = GroupSampler(prompts(50), 50, 1, 0), GroupSampler(prompts(50), 50, 1, 1)
    assert ids(first, 0) != ids(second, 0)
    assert ids(first, 0) != ids(first, 1)


def test_places_in_an_epoch_are_uniform() -> None:
    sampler = GroupSampler(prompts(10), 5, 1, 0)
    # Of 2000 epochs, the first half holds each prompt 1000 times with a standard deviation of 22.4.
    counts = Counter(prompt_id for epoch in range(2000) for prompt_id in ids(sampler, 2 * epoch))
    assert len(counts) == 10
    assert all(abs(count - 1000) < 5 * 22.4 for count in counts.values())


def test_samples_number_the_clips_of_a_group() -> None:
    groups = GroupSampler(prompts(4), 2, 8, 0).groups(3)
    assert [group.samples for group in groups] == [(0, 1, 2, 3, 4, 5, 6, 7)] * 2


@pytest.mark.parametrize(("count", "per_iteration"), [(33, 32), (40, 32), (500, 32)])
def test_late_iterations_replay_no_more_than_p_epochs(count: int, per_iteration: int) -> None:
    sampler = GroupSampler(prompts(count), per_iteration, 1, 0)
    shuffled: list[int] = []
    shuffle = sampler._shuffle
    sampler._shuffled = lambda epoch: (shuffled.append(epoch), shuffle(epoch))[1]  # type: ignore[assignment, func-returns-value]
    assert len(set(ids(sampler, 100_000))) == per_iteration
    # One epoch's chain starts fewer than P epochs back; an iteration touches two epochs.
    assert 1 <= len(shuffled) <= 2 * per_iteration
    assert min(shuffled) > 100_000 * per_iteration // count - per_iteration - 1


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(OmniNFTError, match="found 3 prompts, expected at least prompts_per_iteration = 4"):
        GroupSampler(prompts(3), 4, 2, 0)
    with pytest.raises(OmniNFTError, match="found prompts_per_iteration 0 and group_size 2, expected at least 1"):
        GroupSampler(prompts(3), 0, 2, 0)
    with pytest.raises(OmniNFTError, match="found two prompts of id 'p1', expected distinct ids"):
        GroupSampler([*prompts(3), prompts(2)[1]], 2, 2, 0)
    with pytest.raises(OmniNFTError, match="found iteration -1, expected 0 or more"):
        GroupSampler(prompts(3), 2, 2, 0).groups(-1)
