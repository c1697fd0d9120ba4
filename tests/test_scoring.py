"""Scores for those with no loop of their own: the same as those of a loop by hand, and nothing of the user's is changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import prunewise as pw
from prunewise._loops import cosine, seed_epoch

N, EPOCHS = 60, 4
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(3))
Y = (X[:, 0] > 0).long()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(pw.track(list(zip(X, Y, strict=True))), 16, shuffle=True, **options)


def by_hand(model: nn.Module, batches: DataLoader[Any]) -> pw.SampleScores:
    """The same training, spelled out."""
    made = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    recorder, step, total = pw.LearnabilityRecorder(N), 0, EPOCHS * len(batches)
    for epoch in range(EPOCHS):
        seed_epoch(batches, 7, epoch)
        model.train()
        for x, y, ids in batches:
            made.param_groups[0]["lr"] = 0.01 * cosine(step / total)
            logits = model(x)
            made.zero_grad()
            nn.functional.cross_entropy(logits, y).backward()
            made.step()
            recorder.update(ids, logits.detach(), y)
            step += 1
    return recorder.scores(Y)


def test_equal_to_a_loop_by_hand() -> None:
    model = network()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    scores = pw.score_samples(model, loader(), epochs=EPOCHS, seed=7, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    want = by_hand(network(), loader())
    for name in ("observations", "hits", "learnability", "forgetting", "aum", "el2n", "confidence", "variability"):
        np.testing.assert_array_equal(getattr(scores, name), getattr(want, name), name)
    assert scores.info["label_hash"] == want.info["label_hash"] is not None
    assert (scores.info["model"], scores.info["seed"]) == ("Sequential", 7)


class Stops(nn.Module):
    """A loss that fails at its n-th call."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(logits, targets)


def test_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = pw.score_samples(network(), loader(), epochs=EPOCHS, progress=False)
    with pytest.raises(KeyboardInterrupt):
        pw.score_samples(network(), loader(), epochs=EPOCHS, loss=Stops(11), checkpoint=tmp_path, progress=False)
    again = pw.score_samples(network(), loader(), epochs=EPOCHS, checkpoint=tmp_path, progress=False)
    np.testing.assert_array_equal(whole.aum, again.aum)
    assert whole.info == again.info
    done = pw.score_samples(network(), loader(), epochs=EPOCHS, checkpoint=tmp_path, progress=False)
    np.testing.assert_array_equal(whole.aum, done.aum)
    with pytest.raises(pw.CheckpointError, match="holds another run: its seed is 0, this call's 1"):
        pw.score_samples(network(), loader(), epochs=EPOCHS, seed=1, checkpoint=tmp_path, progress=False)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(pw.CheckpointError):
        pw.score_samples(network(), loader(), epochs=EPOCHS, checkpoint=tmp_path, progress=False)


def test_a_folder_of_other_weights_or_labels(tmp_path: Path) -> None:
    first = pw.score_samples(network(), loader(), epochs=1, checkpoint=tmp_path, progress=False)
    other = network()
    nn.init.normal_(other[0].weight)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="started from other weights than this model's") as caught:
        again = pw.score_samples(other, loader(), epochs=1, checkpoint=tmp_path, progress=False)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(first.aum, again.aum)
    flipped = DataLoader(pw.track(list(zip(X, 1 - Y, strict=True))), 16, shuffle=True)
    with pytest.raises(
        pw.CheckpointError, match=r"a run on other data: sample \d+ had label [01] there and has [01] here"
    ):
        pw.score_samples(network(), flipped, epochs=1, checkpoint=tmp_path, progress=False)


@pytest.mark.parametrize("targets", [Y, Y.float(), Y[:, None].float()])
def test_two_classes_from_one_logit(targets: Tensor) -> None:
    data = DataLoader(pw.track(list(zip(X, targets, strict=True))), 16, shuffle=True)
    torch.manual_seed(0)
    model = nn.Linear(5, 1)
    scores = pw.score_samples(model, data, epochs=15, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), progress=False)
    assert scores.learnability.mean() > 0.9


def test_tokens_with_the_classes_last() -> None:
    y = (X > 0).long()
    data = DataLoader(pw.track(list(zip(X[:, :, None], y, strict=True))), 16, shuffle=True)
    torch.manual_seed(0)
    scores = pw.score_samples(
        nn.Linear(1, 2), data, epochs=15, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), progress=False
    )
    assert scores.learnability.mean() > 0.9


def test_as_many_tokens_as_classes_are_trained_as_the_batches_before() -> None:
    """The layout of `cross_entropy`; the second batch alone could be read either way."""
    many, few = torch.zeros(1, 3, 5), torch.zeros(1, 3, 3)
    many[0, 0], few[0, 0] = 9.0, 9.0
    data = pw.track([(z[0], torch.zeros(z.shape[-1], dtype=torch.long)) for z in (many, few)])
    shift = nn.Linear(1, 1, bias=False)
    nn.init.ones_(shift.weight)
    model = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 1)), shift, nn.Flatten(0), nn.Unflatten(0, (1, 3, -1)))
    losses: list[float] = []
    cross_entropy = nn.functional.cross_entropy

    def noted(*given: Any) -> Tensor:
        losses.append(cross_entropy(*given).item())
        return cross_entropy(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "cross_entropy", noted)
        scores = pw.score_samples(model, DataLoader(data, 1), epochs=1, progress=False)
    assert scores.learnability.tolist() == [1, 1] and max(losses) < 0.01
    with pytest.raises(pw.DataError, match="the classes may be in the last dimension or in the second"):
        pw.score_samples(model, DataLoader(Subset(data, [1]), 1), epochs=1, progress=False)


def test_epochs_of_different_lengths(tmp_path: Path) -> None:
    """A curriculum: the rate falls over the whole run, the look at a first batch costs no samples, and the run can be resumed."""
    data = pw.track(list(zip(X, Y, strict=True)))
    known = pw.score_samples(network(), loader(), epochs=2, progress=False)

    def graded() -> DataLoader[Any]:
        return DataLoader(data, 16, sampler=pw.CurriculumSampler(known, epochs=3, start=0.3))

    shares: list[float] = []

    def schedule(share: float) -> float:
        shares.append(share)
        return 1.0

    same = {"epochs": 3, "lr_schedule": schedule, "progress": False}
    whole = pw.score_samples(network(), graded(), **same)  # type: ignore[arg-type]
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] < 1
    assert np.allclose(np.diff(shares), 1 / len(shares))
    with pytest.raises(KeyboardInterrupt):
        pw.score_samples(network(), graded(), loss=Stops(2), checkpoint=tmp_path, **same)  # type: ignore[arg-type]
    again = graded()
    first = pw.score_samples(network(), again, checkpoint=tmp_path, **same)  # type: ignore[arg-type]
    np.testing.assert_array_equal(first.observations, whole.observations)
    pw.score_samples(network(), again, checkpoint=tmp_path, **same)  # type: ignore[arg-type]


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(x)}


def test_dicts_subsets_and_own_ids() -> None:
    rows = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    data = pw.track(rows, ids=[f"s{i}" for i in range(N)])
    part = Subset(data, range(0, N, 2))
    scores = pw.score_samples(ByName(), DataLoader(part, 10), epochs=2, progress=False)
    assert list(scores.sample_id[:3]) == ["s0", "s1", "s2"]
    assert scores.observations.tolist() == [2, 0] * (N // 2)
    assert scores.info["label_hash"] is None, "the labels of the others are not known"


@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss()])
def test_labels_that_are_no_classes(loss: Any) -> None:
    data = pw.track([(x, 2 * int(y)) for x, y in zip(X, Y, strict=True)])
    with pytest.raises(pw.DataError, match="have labels that do not fit 2 classes"):
        pw.score_samples(network(), DataLoader(data, 16), epochs=1, loss=loss, progress=False)
    named = pw.track([(x, "ab"[y]) for x, y in zip(X, Y, strict=True)])
    with pytest.raises(pw.DataError, match="takes the targets as a tensor"):
        pw.score_samples(network(), DataLoader(named, 16), epochs=1, loss=loss, progress=False)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"train_loader": DataLoader(list(zip(X, Y, strict=True)), 8)}, pw.DataError, r"prunewise\.track\(dataset\)"),
        ({"train_loader": [(X, Y)]}, pw.DataError, r"prunewise\.track\(dataset\)"),
        ({"train_loader": pw.track(list(zip(X, Y, strict=True)))}, pw.DataError, "make a DataLoader of it"),
        ({"epochs": 0}, pw.DataError, "epochs=0 should be an int of at least 1"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, pw.DataError, r"one number and is \(16,\)"),
        ({"loss": lambda logits, targets: logits.sum() * float("nan")}, pw.NonFiniteError, "the loss is nan at epoch 1, step 1"),
        ({"optimizer": lambda parameters: None}, pw.DataError, "optimizer= gave a NoneType"),
        ({"model": nn.Flatten()}, pw.DataError, "no parameter"),
        ({"optimizer": "sgd"}, pw.DataError, "optimizer='sgd' should be a callable that makes a torch.optim.Optimizer"),
        ({"loss": "ce"}, pw.DataError, "loss='ce' should be a callable"),
        ({"lr_schedule": 0.1}, pw.DataError, "lr_schedule=0.1 should be a callable"),
        ({"lr_schedule": lambda share: None}, pw.DataError, "lr_schedule gave None at 0 of the run"),
        ({"checkpoint": __file__}, pw.CheckpointError, "is a file: name a folder"),
    ],
)  # fmt: skip
def test_bad_input(given: dict[str, Any], error: type[Exception], message: str) -> None:
    settings = {"model": network(), "train_loader": loader(), "epochs": 1, **given}
    with pytest.raises(error, match=message):
        pw.score_samples(settings.pop("model"), settings.pop("train_loader"), **settings, progress=False)
