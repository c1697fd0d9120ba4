"""Two ranks record what one process would."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DistributedSampler

import prunewise as pw
from prunewise.samples.scores import COLUMNS

N, K, EPOCHS = 11, 3, 4  # an odd number: with two ranks the sampler repeats one sample
LABELS = torch.arange(N) % K


def logits_of(epoch: int) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(epoch))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        rec = pw.LearnabilityRecorder(N, trace=EPOCHS, trace_margins=True)
        sampler: Any = DistributedSampler(range(N), num_replicas=2, rank=rank, shuffle=True)
        seen = 0
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            for ids in torch.tensor(list(sampler)).split(4):
                seen += len(ids)
                rec.update(ids, logits_of(epoch)[ids], LABELS[ids])
            if epoch == 1:  # a resume in between, on all ranks
                saved, rec = rec.state_dict(), pw.LearnabilityRecorder(N, trace=EPOCHS, trace_margins=True)
                rec.load_state_dict(saved)
            rec.reduce()
        assert seen == EPOCHS * 6  # twelve a step of the two, for eleven samples
        rec.reduce()  # once more changes nothing
        torch.save(rec.state_dict(), f"{folder}/rank{rank}.pt")
        if rank == 1:  # one rank's NaN and bad label are every rank's business
            nan = torch.full((2, K), float("nan"))
            rec.update(torch.tensor([0, 1]), nan, LABELS[:2])
        rec.reduce()
        assert rec.not_counted["not finite"] == 2
        if rank == 0:
            assert rec._tally is not None
            rec._tally[-3:] += 1  # as a GPU leaves it
        try:
            rec.reduce()
        except pw.DataError as error:
            assert "1 batches were not recorded" in str(error)
        else:
            raise AssertionError("no error on this rank")
        idle = pw.LearnabilityRecorder(N)  # a rank that saw nothing takes part
        if rank == 0:
            idle.update(torch.tensor([3]), logits_of(0)[3:4], LABELS[3:4])
        idle.reduce()
        assert idle.scores().observations.sum() == 1
        assert idle.scores().info["task"] == "multiclass" and idle.num_classes == K, "and knows what the other recorded"
        apart = pw.LearnabilityRecorder(N)  # ranks that record different things
        apart.update(torch.tensor([3]), logits_of(0)[3:4, : 3 - rank], LABELS[:1])
        with pytest.raises(pw.DataError, match=r"the ranks recorded different numbers of classes \(2 and 3\)"):
            apart.reduce()
        assert apart.scores().observations.sum() == 1, "nothing is merged"
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def states() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(folder,), nprocs=2)
        return [torch.load(os.path.join(folder, f"rank{r}.pt"), weights_only=True) for r in range(2)]


def test_two_ranks_equal_one_process_to_the_bit(states: list[dict[str, Any]]) -> None:
    alone = pw.LearnabilityRecorder(N, trace=EPOCHS, trace_margins=True)
    for epoch in range(EPOCHS):
        alone.update(torch.arange(N), logits_of(epoch), LABELS)
        alone.reduce()  # without a process group: nothing
    for state in states:
        rec = pw.LearnabilityRecorder(N, trace=EPOCHS, trace_margins=True)
        rec.load_state_dict(state)
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(rec.scores(), name), getattr(alone.scores(), name), err_msg=name)
        np.testing.assert_array_equal(rec.trace()[0], alone.trace()[0])
        np.testing.assert_array_equal(rec.trace()[1], alone.trace()[1])


def test_padding_is_not_counted_twice(states: list[dict[str, Any]]) -> None:
    for state in states:
        assert state["tensors"]["counts"][:, 0].tolist() == [EPOCHS] * N
