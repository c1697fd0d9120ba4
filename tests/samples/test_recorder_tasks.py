"""What an observation is, task by task; and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.samples.scores import COLUMNS
from tests.oracle import samples as oracle

torch.manual_seed(0)
B, K = 6, 5
Z = torch.randn(B, K)
Y = torch.tensor([0, 4, 2, 2, 1, 3])
IDS = torch.arange(B)


def scores(logits: Tensor, targets: Tensor, **given: Any) -> pw.SampleScores:
    mixed = given.pop("mixed", False)
    rec = pw.LearnabilityRecorder(len(logits), **given)
    rec.update(torch.arange(len(logits)), logits, targets, mixed=mixed)
    return rec.scores()


def same(a: pw.SampleScores, b: pw.SampleScores) -> None:
    for name in COLUMNS:
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("shape", [(B,), (B, 1)])
@pytest.mark.parametrize("dtype", [torch.long, torch.float, torch.bool, torch.uint8])
def test_binary_is_two_classes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z, y = Z[:, 0], torch.tensor([0, 1, 1, 0, 1, 0])
    two = torch.stack([torch.zeros(B), z], 1)
    same(scores(z.reshape(shape), y.to(dtype).reshape(shape)), scores(two, y))
    same(scores(z.reshape(shape), y.to(dtype)), scores(two, y))


def test_one_hot_floats_are_class_numbers() -> None:
    same(scores(Z, torch.eye(K)[Y]), scores(Z, Y))
    same(scores(Z, torch.eye(K, dtype=torch.half)[Y]), scores(Z, Y))


def test_smoothed_labels_against_the_reference() -> None:
    t = torch.eye(K)[Y] * 0.9 + 0.1 / K
    found = scores(Z, t)
    for i in range(B):
        seen = oracle.one_observation(Z[i].tolist(), int(Y[i]), t[i].tolist())
        for name in ("aum", "aum_softmax", "confidence", "loss", "el2n"):
            assert getattr(found, name)[i] == pytest.approx(seen[name], rel=1e-5), name
        assert found.hits[i] == seen["hit"]


def test_soft_labels_are_taken_when_asked() -> None:
    t = torch.softmax(torch.randn(B, K, generator=torch.Generator().manual_seed(1)), 1)
    found = scores(Z, t, soft_labels=True)
    for i in range(B):
        seen = oracle.one_observation(Z[i].tolist(), int(t[i].argmax()), t[i].tolist())
        for name in ("aum", "confidence", "loss", "el2n"):
            assert getattr(found, name)[i] == pytest.approx(seen[name], rel=1e-5), name


def test_mixed_inputs_are_not_counted_and_it_says_so() -> None:
    one_hot = torch.eye(K)[Y]
    t = one_hot.clone()
    t[1] = 0.7 * one_hot[1] + 0.3 * one_hot[2]  # mixup
    t[3] = 0.5 * one_hot[3] + 0.5 * one_hot[0]
    t[4] = (0.6 * one_hot[4] + 0.4 * one_hot[0]) * 0.9 + 0.1 / K  # mixup of smoothed labels
    rec = pw.LearnabilityRecorder(B)
    rec.update(IDS, Z, t)
    assert rec.scores().observations.tolist() == [1, 0, 1, 0, 0, 1]
    assert rec.not_counted == {"not finite": 0, "ignored": 0, "mixed": 3, "no single class": 0}


def test_mixed_inputs_by_flag() -> None:
    rec = pw.LearnabilityRecorder(B)
    rec.update(IDS, Z, Y, mixed=True)
    with pytest.raises(pw.DataError, match="counted no observation .6 mixed"):
        rec.scores()
    rec.update(IDS, Z, Y, mixed=IDS < 2)
    assert rec.scores().observations.tolist() == [0, 0, 1, 1, 1, 1] and rec.not_counted["mixed"] == 8
    with pytest.raises(pw.DataError, match="mixed="):
        rec.update(IDS, Z, Y, mixed=torch.ones(2, dtype=torch.bool))


def test_a_distribution_without_a_highest_class() -> None:
    t = torch.full((B, K), 1 / K)
    t[0] = torch.eye(K)[0]
    rec = pw.LearnabilityRecorder(B)
    rec.update(IDS, Z, t)
    assert rec.scores().observations.tolist() == [1, 0, 0, 0, 0, 0] and rec.not_counted["no single class"] == 5


def test_multilabel_against_a_loop() -> None:
    t = (torch.arange(B * K).reshape(B, K) % 3 == 0).long()
    z = Z.clone()
    z[2] = (2 * t[2] - 1) * 2.0  # all right
    for targets in (t, t.float(), t.bool()):
        found = scores(z, targets, task="multilabel")
        for i in range(B):
            signed = [(1 if t[i, k] else -1) * float(z[i, k]) for k in range(K)]
            own = [1 / (1 + math.exp(-s)) for s in signed]
            assert found.hits[i] == all(s > 0 for s in signed)
            assert found.aum[i] == pytest.approx(min(signed), rel=1e-5)
            assert found.aum_softmax[i] == pytest.approx(2 * min(own) - 1, rel=1e-4, abs=1e-6)
            assert found.confidence[i] == pytest.approx(sum(own) / K, rel=1e-5)
            assert found.loss[i] == pytest.approx(-sum(map(math.log, own)) / K, rel=1e-5)
            assert found.el2n[i] == pytest.approx(math.sqrt(sum((1 - p) ** 2 for p in own)), rel=1e-5)
        assert found.hits[2] == 1 and found.last_wrong.tolist() == [-1] * B


def test_several_labels_of_whole_numbers_must_be_named() -> None:
    with pytest.raises(pw.DataError, match="task='multilabel'"):
        scores(Z, torch.ones(B, K, dtype=torch.long))


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("layout", ["last", "second"])
def test_tokens_against_a_loop(share: float, layout: str) -> None:
    generator = torch.Generator().manual_seed(2)
    z, y = torch.randn(B, 7, K, generator=generator), torch.randint(K, (B, 7), generator=generator)
    z[0].scatter_(1, y[0][:, None], 9.0)
    y[1, :5], y[2, :], y[3, 0] = -100, -100, -100
    rec = pw.LearnabilityRecorder(B, hit_share=share)
    rec.update(IDS, z if layout == "last" else z.movedim(-1, 1), y)
    found = rec.scores()
    assert found.observations.tolist() == [1, 1, 0, 1, 1, 1] and rec.not_counted["ignored"] == 1
    for i in (0, 1, 3, 4, 5):
        seen = [oracle.one_observation(z[i, j].tolist(), int(y[i, j])) for j in range(7) if int(y[i, j]) != -100]
        assert found.hits[i] == (sum(s["hit"] for s in seen) / len(seen) >= share)
        for name in ("aum", "aum_softmax", "confidence", "loss", "el2n"):
            mean = sum(s[name] for s in seen) / len(seen)
            assert getattr(found, name)[i] == pytest.approx(mean, rel=1e-5, abs=1e-6), name
    assert found.hits[0] == 1 and found.last_wrong.tolist() == [-1] * B


def test_segmentation_is_tokens() -> None:
    z, y = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    same(scores(z, y), scores(z.flatten(2).movedim(1, 2), y.flatten(1)))


def test_one_broken_token_spoils_its_sample() -> None:
    z, y = torch.zeros(2, 3, K), torch.zeros(2, 3, dtype=torch.long)
    z[0, 1, 2] = math.nan
    rec = pw.LearnabilityRecorder(2)
    rec.update(torch.arange(2), z, y)
    assert rec.scores().observations.tolist() == [0, 1] and rec.not_counted["not finite"] == 1


def test_ids_of_one_s_own() -> None:
    rec = pw.LearnabilityRecorder(3, ids=["a", "b", "c"])
    rec.update(["c", "a"], Z[:2], Y[:2])
    rec.update(("c",), Z[:1], Y[:1])
    rec.update(torch.tensor([2]), Z[:1], Y[:1])  # numbers, as track makes them
    found = rec.scores()
    assert found.observations.tolist() == [1, 0, 3] and found.sample_id.tolist() == ["a", "b", "c"]
    with pytest.raises(pw.DataError, match="'z' is none of"):
        rec.update(["z"], Z[:1], Y[:1])


def test_ids_in_any_container() -> None:
    expected = scores(Z, Y)
    for ids in (IDS.tolist(), IDS.numpy(), IDS.int(), IDS.to(torch.uint8), IDS[:, None]):
        rec = pw.LearnabilityRecorder(B)
        rec.update(ids, Z, Y)
        same(rec.scores(), expected)


BAD: list[tuple[Any, str]] = [
    ((torch.tensor([0, 6]), Z[:2], Y[:2]), "sample id 6 is not in .0, 6"),
    ((torch.tensor([0, -1]), Z[:2], Y[:2]), "sample id -1 is not in"),
    ((IDS[:3], Z[:2], Y[:2]), "sample ids for the logits of 2"),
    ((IDS[:2].float(), Z[:2], Y[:2]), "ids are whole numbers"),
    ((3, Z[:1], Y[:1]), "the sample ids are an int"),
    ((IDS[:2], Z[:2], torch.tensor([0, 5])), "do not fit 5 classes"),
    ((IDS[:2], Z[:2], torch.tensor([0, -1])), "do not fit 5 classes"),
    ((IDS[:2], Z[:2], Y[:3]), "first dimension"),
    ((IDS[:2], Z[:2, None, None], Y[:2]), "do not fit; expected"),
    ((IDS[:2], Z[:2].argmax(1), Y[:2]), "before softmax and argmax"),
    ((IDS[:2], Z[:2, :3], Y[:2]), "logits of 3 classes, after 5"),
    ((IDS[:2], Z[:2], torch.full((2, K), 0.9)), "distributions that sum to 1"),
    ((IDS[:2], Z[:2], torch.full((2, K), math.nan)), "distributions that sum to 1"),
    ((IDS[:2], Z[:2].tolist(), Y[:2]), "update takes the logits as a tensor; got a list"),
    ((IDS[:2], Z[:2], ["cat", "dog"]), "update takes the targets as a tensor; got a list"),
    ((IDS[:2], Z[:2], Y[:2].float()), r"class numbers are whole numbers: targets\.long\(\)"),
    ((IDS[:2], Z[:2], Y[:2].to(torch.cfloat)), "complex"),
    ((IDS[:2], torch.tensor(1.0), Y[:2]), "single number"),
    ((IDS[:2], torch.randn(2, 3, K), torch.randint(K, (2, 3))), "do not fit"),
]  # fmt: skip


@pytest.mark.parametrize(("batch", "message"), BAD, ids=[m for _, m in BAD])
def test_a_refused_batch_leaves_no_mark(batch: Any, message: str) -> None:
    rec = pw.LearnabilityRecorder(B)
    rec.update(IDS, Z, Y)
    before = rec.state_dict()
    with pytest.raises(pw.DataError, match=message):
        rec.update(*batch)
    after = rec.state_dict()
    assert all(torch.equal(after["tensors"][n], t) for n, t in before["tensors"].items())
    assert {k: v for k, v in after.items() if k != "tensors"} == {k: v for k, v in before.items() if k != "tensors"}


def test_a_refused_first_batch_decides_nothing() -> None:
    rec = pw.LearnabilityRecorder(B)
    with pytest.raises(pw.DataError):
        rec.update(IDS, Z[:, :1], torch.full((B,), 7))
    same(with_update(rec).scores(), scores(Z, Y))


def with_update(rec: pw.LearnabilityRecorder) -> pw.LearnabilityRecorder:
    rec.update(IDS, Z, Y)
    return rec


def test_never_updated() -> None:
    with pytest.raises(pw.DataError, match="no observation.*update.sample_ids, logits, targets"):
        pw.LearnabilityRecorder(3).scores()
    rec = pw.LearnabilityRecorder(3)
    rec.update(IDS[:0], Z[:0], Y[:0])  # an empty batch is fine, and nothing
    with pytest.raises(pw.DataError, match="no observation"):
        rec.scores()


@pytest.mark.parametrize(
    "given",
    [{"n": 0}, {"n": -1}, {"n": 2.5}, {"n": True}, {"task": "regression"}, {"mode": "both"}, {"el2n_window": 0},
     {"hit_share": 0}, {"hit_share": 1.5}, {"trace": -1}, {"trace_margins": True}, {"ids": ["a"]}, {"ignore_index": 0.5}],
)  # fmt: skip
def test_settings_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(pw.DataError):
        pw.LearnabilityRecorder(**{"n": 3, **given})


# -- deferred checks, as on a GPU ---------------------------------------------------------------------------------


def test_compiled_updates_equal_eager_ones_and_find_bad_input_later() -> None:
    """Compiled, nothing may wait for values: the path that a GPU takes."""
    rec, eager = (pw.LearnabilityRecorder(40, task="multiclass", device="cpu") for _ in range(2))
    step = torch.compile(lambda i, z, y: rec.update(i, z, y), fullgraph=True, backend="eager")
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        ids = torch.randint(40, (16,), generator=generator)
        z, y = torch.randn(16, K, generator=generator), torch.randint(K, (16,), generator=generator)
        step(ids, z, y)
        eager.update(ids, z, y)
    step(torch.arange(16) + 30, torch.zeros(16, K), torch.zeros(16, dtype=torch.long))
    step(torch.arange(16), torch.zeros(16, K), torch.full((16,), K))
    with pytest.raises(pw.DataError, match="2 batches were not recorded: 6 sample ids.*16 samples had labels"):
        rec.scores()
    found = rec.scores()  # said once
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(found, name), getattr(eager.scores(), name), err_msg=name)


@pytest.mark.parametrize(
    ("task", "logits", "targets"),
    [("auto", (8, K), (8,)), ("auto", (8, 3, K), (8, 3)), ("multilabel", (8, K), (8, K)), ("auto", (8,), (8,))],
)
def test_an_update_reads_no_value_back(task: str, logits: tuple[int, ...], targets: tuple[int, ...]) -> None:
    """Tensors on the meta device have no values: what would wait for a GPU is an error here."""
    rec = pw.LearnabilityRecorder(50, task=task, trace=9, trace_margins=True, device="meta")
    for _ in range(3):
        ids = torch.zeros(8, dtype=torch.long, device="meta")
        y = torch.zeros(targets, dtype=torch.long, device="meta")
        rec.update(ids, torch.zeros(logits, device="meta"), y, mixed=torch.zeros(8, dtype=torch.bool, device="meta"))
    rec._flush()
    assert rec._state is not None and rec._state.counts.is_meta
    with pytest.raises(NotImplementedError):
        rec.scores()
    soft = pw.LearnabilityRecorder(50, device="meta")
    soft.update(torch.arange(8), torch.zeros(8, K, device="meta"), torch.zeros(8, K, device="meta"))


def test_only_the_bad_batch_is_left_out_later() -> None:
    """Three batches worked out together without looking, as on a GPU; the second one has a bad label."""
    rec = pw.LearnabilityRecorder(9)
    labels = torch.tensor([0, 1, 2])
    for number in range(3):
        z = torch.eye(K)[labels]
        y = labels.clone()
        y[1] = K if number == 1 else 1
        rec._window.add(labels + 3 * number, z, y, False)
    rec.num_classes = K
    rec._record("multiclass", rec._window.take(), at_once=False)
    with pytest.raises(pw.DataError, match="1 batches were not recorded: 0 sample ids.*1 samples had labels"):
        rec.scores()
    assert rec.scores().hits.tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]


def test_repeats_worked_out_together_are_observed_in_order() -> None:
    later, at_once = pw.LearnabilityRecorder(4), pw.LearnabilityRecorder(4)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        ids, y = torch.randint(4, (6,), generator=generator), torch.randint(K, (6,), generator=generator)
        z = torch.randn(6, K, generator=generator)
        later._window.add(ids, z, y, False)
        at_once.update(ids, z, y)
    later._record("multiclass", later._window.take(), at_once=False)
    same(later.scores(), at_once.scores())


# -- clean passes -------------------------------------------------------------------------------------------------


class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> Any:
        return torch.full((3,), i / 20), i % 2


def test_a_clean_pass_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model.train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loader = torch.utils.data.DataLoader(pw.track(Data()), batch_size=6, shuffle=True)
    rec = pw.LearnabilityRecorder(20, mode="clean")
    rec.clean_pass(model, loader)
    assert model.training and not model[1].training and model[2].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()
    x, y = torch.stack([Data()[i][0] for i in range(20)]), torch.arange(20) % 2
    same(rec.scores(), scores(model(x), y))
    assert rec.scores().info["mode"] == "clean"


def test_clean_passes_of_other_batches() -> None:
    rec = pw.LearnabilityRecorder(B, mode="clean")
    model = nn.Identity()
    rec.clean_pass(Wrapped(), [{"x": Z, "labels": Y, "sample_id": IDS}])
    rec.clean_pass(model, [(IDS, Z, Y)], forward=lambda m, b: (b[0], m(b[1]), b[2]))
    assert rec.scores().observations.tolist() == [2] * B
    with pytest.raises(pw.DataError, match="a tuple of 2: expected .inputs, targets, sample ids"):
        rec.clean_pass(model, [(Z, Y)])
    with pytest.raises(pw.DataError, match="a dict of x, y"):
        rec.clean_pass(model, [{"x": Z, "y": Y}])
    with pytest.raises(pw.DataError, match="mode='clean'"):
        pw.LearnabilityRecorder(B).clean_pass(model, [])


class Wrapped(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x}


def test_as_many_tokens_as_classes_follow_the_batches_before() -> None:
    """Lengths 5, 3, 2 with three classes, in the layout of `cross_entropy`; every token is right."""
    recorder = pw.LearnabilityRecorder(3)
    for number, labels in enumerate(([[0, 1, 1, 2, 0]], [[0, 0, 1]], [[2, 1]])):
        y = torch.tensor(labels)
        z = 9 * nn.functional.one_hot(y, 3).float().transpose(1, 2)
        if number == 1:
            resumed = pw.LearnabilityRecorder(3)
            resumed.load_state_dict(recorder.state_dict())
            recorder = resumed
        recorder.update(torch.tensor([number]), z, y)
    assert recorder.scores().learnability.tolist() == [1, 1, 1]
    y = torch.tensor([[0, 0, 1]])
    z = 9 * nn.functional.one_hot(y, 3).float().transpose(1, 2)
    with pytest.raises(pw.DataError, match="say class_dim=-1 or class_dim=1"):
        pw.LearnabilityRecorder(1).update([0], z, y)
    said = pw.LearnabilityRecorder(1, class_dim=1)
    said.update([0], z, y)
    assert said.scores().learnability.tolist() == [1]
    with pytest.raises(pw.DataError, match="do not have the classes in dimension 1"):
        said.update([0], torch.zeros(1, 5, 3), torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(pw.DataError, match="class_dim=2"):
        pw.LearnabilityRecorder(1, class_dim=2)


def test_at_a_tie_with_the_label_the_other_class_is_predicted() -> None:
    recorder = pw.LearnabilityRecorder(1)
    recorder.update([0], torch.tensor([[0.0, 0.0, -9.0]]), torch.tensor([0]))
    assert recorder.scores().last_wrong.tolist() == [1]


@pytest.mark.parametrize("mixed", [np.array([True] + [False] * (B - 1)), [True] + [False] * (B - 1)])
def test_mixed_as_a_list_or_an_array(mixed: Any) -> None:
    same(scores(Z, Y, mixed=mixed), scores(Z, Y, mixed=torch.tensor(mixed)))


@pytest.mark.parametrize("mixed", ["yes", [True], [1] * B, None])
def test_what_mixed_is_not(mixed: Any) -> None:
    recorder = pw.LearnabilityRecorder(B)
    recorder.update(IDS, Z, Y)
    with pytest.raises(pw.DataError, match="one truth value a sample"):
        recorder.update(IDS, Z, Y, mixed=mixed)
    assert recorder.scores().observations.tolist() == [1] * B, "nothing that waited is lost"


def test_first_used_under_inference_mode() -> None:
    recorder = pw.LearnabilityRecorder(B)
    with torch.inference_mode():
        for _ in range(5):
            recorder.update(IDS, Z, Y)
    assert recorder.scores().observations.tolist() == [5] * B
    recorder.update(IDS, Z, Y)
    assert recorder.scores().observations.tolist() == [6] * B


def test_compiled_updates_come_after_those_before_them() -> None:
    recorder = pw.LearnabilityRecorder(1)
    recorder.update(torch.tensor([0]), torch.tensor([[1.0, 0.0]]), torch.tensor([0]))

    @torch.compile(backend="eager")
    def step(z: Tensor) -> None:
        recorder.update(torch.tensor([0]), z, torch.tensor([0]))

    step(torch.tensor([[0.0, 1.0]]))
    found = recorder.scores()
    assert (found.forgetting[0], found.last_missed[0], found.first_learnt[0]) == (1, 1, 0)


@pytest.mark.parametrize("where", ["ids", "logits", "targets", "mixed"])
def test_what_holds_no_values_is_refused_and_what_waits_is_kept(where: str) -> None:
    rec = pw.LearnabilityRecorder(B)
    rec.update(IDS, Z, Y)
    given: dict[str, Any] = {"ids": IDS, "logits": Z, "targets": Y, "mixed": torch.zeros(B, dtype=torch.bool)}
    for wrong in (given[where].to("meta"), given[where].to_sparse()):
        values = {**given, where: wrong}
        with pytest.raises(pw.DataError, match="give a dense tensor with values"):
            rec.update(values["ids"], values["logits"], values["targets"], mixed=values["mixed"])
    assert rec.scores().observations.tolist() == [1] * B


def test_of_two_classes_a_mixture_is_told_by_its_second() -> None:
    rec = pw.LearnabilityRecorder(4)
    rec.update(
        torch.arange(4), torch.tensor([[2.0, 0.0]] * 4), torch.tensor([[0.95, 0.05], [0.8, 0.2], [0.6, 0.4], [0, 1]])
    )
    assert rec.scores().observations.tolist() == [1, 1, 0, 1] and rec.not_counted["mixed"] == 1
    soft = pw.LearnabilityRecorder(3, soft_labels=True, task="binary")
    soft.update(torch.arange(3), torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0.6, 0.1, -100.0]))
    assert soft.scores().observations.tolist() == [1, 1, 0] and soft.not_counted["ignored"] == 1


def test_settings_of_ones_own_outlast_a_state() -> None:
    last = pw.LearnabilityRecorder(2, class_dim=-1)
    last.update(torch.arange(2), torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(pw.CheckpointError, match="of class_dim=-1, this recorder of class_dim=1"):
        pw.LearnabilityRecorder(2, class_dim=1).load_state_dict(last.state_dict())
    # what was told by batches is replaced, and forgotten
    rec = pw.LearnabilityRecorder(2)
    rec.update(torch.arange(2), torch.randn(2), torch.ones(2))
    rec.load_state_dict(last.state_dict())
    assert rec.scores().info["task"] == "tokens"
    rec.load_state_dict(pw.LearnabilityRecorder(2).state_dict())
    rec.update(torch.arange(2), torch.randn(2, 3, 5), torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize(("name", "value"), [("means", float("nan")), ("small", -5), ("counts", -1)])
def test_damaged_states_are_refused(name: str, value: float) -> None:
    rec = pw.LearnabilityRecorder(B)
    rec.update(IDS, Z, Y)
    state = rec.state_dict()
    state["tensors"][name].fill_(value)
    with pytest.raises(pw.CheckpointError, match=f"damaged: {name} holds what no recorder writes"):
        pw.LearnabilityRecorder(B).load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pw.LearnabilityRecorder(3, device="nonsense"), "device='nonsense' is no device"),
        (lambda: pw.LearnabilityRecorder(3, ids=5.5), "5.5 is no list of sample ids"),
        (lambda: pw.track([1, 2], ids=2.5), "2.5 is no list of sample ids"),
        (lambda: pw.track([1, 2], ids=-1), "-1 is no number of samples"),
        (
            lambda: pw.LearnabilityRecorder(3).update([0, 2**70], torch.randn(2, 3), torch.zeros(2).long()),
            "none of the 3",
        ),
        (
            lambda: pw.LearnabilityRecorder(3, task="multilabel").update([0], torch.randn(1, 0), torch.ones(1, 0)),
            "do not fit",
        ),
    ],
)
def test_more_bad_input(make: Any, message: str) -> None:
    with pytest.raises(pw.DataError, match=message):
        make()


def test_the_share_of_hits_does_not_depend_on_the_default_dtype() -> None:
    z = torch.zeros(1, 1000, 2)
    z[0, :500, 0], z[0, 500:, 1] = 1, 1
    torch.set_default_dtype(torch.bfloat16)
    try:
        rec = pw.LearnabilityRecorder(1, hit_share=0.501)
        rec.update([0], z, torch.zeros(1, 1000, dtype=torch.long))
    finally:
        torch.set_default_dtype(torch.float32)
    assert rec.scores().hits.tolist() == [0]


def test_a_state_of_another_task_is_refused() -> None:
    many = pw.LearnabilityRecorder(B, task="multilabel")
    many.update(IDS, Z, (Z > 0).long())
    with pytest.raises(pw.CheckpointError, match="of task='multilabel', this recorder of task='multiclass'"):
        pw.LearnabilityRecorder(B, task="multiclass").load_state_dict(many.state_dict())
