import math

import pytest
import torch
from torch.utils.data import DistributedSampler

from scalablevit_pl.data.samplers import EvaluationSampler, TrainingSampler


@pytest.mark.parametrize("samples", [0, 1, 2, 5, 6, 7, 40])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_evaluation_sampler_yields_each_sample_exactly_once(samples: int, processes: int) -> None:
    samplers = [EvaluationSampler(range(samples), processes, rank) for rank in range(processes)]
    assert {len(list(sampler)) for sampler in samplers} == {len(samplers[0])} == {math.ceil(samples / processes)}
    assert sorted(index for sampler in samplers for index in sampler if index >= 0) == list(range(samples))
    assert all(index == -1 for sampler in samplers for index in sampler if index < 0)
    assert isinstance(samplers[0], DistributedSampler)  # or else Lightning would replace it by one that pads


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_a_global_batch_is_the_same_for_any_number_of_processes(repeats: int) -> None:
    whole = TrainingSampler(50, batch_size=12, seed=3, repeats=repeats)
    batches = [list(whole)[start : start + 12] for start in (0, 12, 24, 36)]
    for processes in (2, 3, 6):
        samplers = [TrainingSampler(50, 12 // processes, processes, rank, 3, repeats) for rank in range(processes)]
        assert all(isinstance(sampler, DistributedSampler) for sampler in samplers)
        size = 12 // processes
        for number, batch in enumerate(batches):
            parts = [list(sampler)[number * size : (number + 1) * size] for sampler in samplers]
            assert sorted(draw for part in parts for draw in part) == sorted(batch)


def test_an_epoch_is_a_shuffle_that_depends_on_seed_and_epoch_only() -> None:
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1, 5):
            torch.manual_seed(epoch)
            sampler = TrainingSampler(40, batch_size=40, seed=seed)
            sampler.set_epoch(epoch)
            draws = list(sampler)
            assert sorted(draw.position for draw in draws) == list(range(40))
            assert {(draw.epoch, draw.repeat) for draw in draws} == {(epoch, 0)}
            orders[seed, epoch] = tuple(draw.position for draw in draws)
            assert draws == list(sampler)
    assert len(set(orders.values())) == 6


def test_an_interrupted_epoch_resumes_in_its_middle() -> None:
    sampler, resumed = TrainingSampler(43, 5, 2, 1, seed=4), TrainingSampler(43, 5, 2, 1, seed=4, epoch=3, batch=2)
    sampler.set_epoch(3)
    assert len(resumed) == len(sampler) == 20
    assert list(resumed) == list(sampler)[10:]
    for each in (sampler, resumed):
        each.set_epoch(4)
    assert list(resumed) == list(sampler)


WEIGHTS = torch.tensor([1.0] * 30 + [3.0] * 10, dtype=torch.float64)  # two groups, equally probable


def test_weights_draw_images_as_often_as_they_say() -> None:
    sampler = TrainingSampler(40, batch_size=40, weights=WEIGHTS)
    drawn = []
    for epoch in range(50):
        sampler.set_epoch(epoch)
        drawn += [draw.position for draw in sampler]
    assert len(drawn) == 2000
    assert sum(position >= 30 for position in drawn) / 2000 == pytest.approx(0.5, abs=0.05)
    assert set(drawn) == set(range(40))


@pytest.mark.parametrize("repeats", [1, 3])
def test_an_image_that_is_drawn_again_is_augmented_anew(repeats: int) -> None:
    draws = list(TrainingSampler(40, batch_size=40, repeats=repeats, weights=WEIGHTS))
    assert max(draw.repeat for draw in draws) >= 2
    for position in {draw.position for draw in draws}:
        times = [draw.repeat for draw in draws if draw.position == position]
        assert times == list(range(len(times)))


def test_weighted_draws_resume_and_are_shared_by_processes_exactly() -> None:
    whole, resumed = (
        TrainingSampler(43, 10, seed=4, epoch=3, batch=batch, weights=torch.cat([WEIGHTS, WEIGHTS[:3]]))
        for batch in (0, 2)
    )
    assert list(resumed) == list(whole)[20:]
    shares = [
        list(TrainingSampler(43, 5, 2, rank, seed=4, epoch=3, weights=torch.cat([WEIGHTS, WEIGHTS[:3]])))
        for rank in range(2)
    ]
    assert [draw for pair in zip(*shares, strict=True) for draw in pair] == list(whole)


def test_repeats_draw_fewer_images_several_times_each() -> None:
    draws = list(TrainingSampler(30, batch_size=6, repeats=3))
    assert len(draws) == 30
    assert {draw.repeat for draw in draws} == {0, 1, 2}
    positions = [draw.position for draw in draws]
    assert all(positions.count(position) == 3 for position in set(positions))
    assert len(set(draws)) == 30
