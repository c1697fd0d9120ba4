"""Folders of pruned models that are damaged, or made to harm: an error of the library, and no harm done."""

import hashlib
import json
import os
import shutil
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import prunewise as pw
from tests.files import X, factory, pruned, same


def refused(folder, match, make=factory):
    with pytest.raises(pw.CheckpointError, match=match) as caught:
        pw.load_pruned(folder, make)
    assert len(str(caught.value)) < 1200


def edit(folder, change):
    """Change plan.json as data."""
    data = json.loads((folder / "plan.json").read_text())
    change(data)
    (folder / "plan.json").write_text(json.dumps(data))


def forge(folder, change=None, raw=None, body=None):
    """Rewrite the weights with another header (or body), and the hash in plan.json to match."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if change is not None:
        header = change(header) or header
    text = raw if raw is not None else json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + (body(data) if body else data)
    path.write_bytes(content)
    edit(folder, lambda d: d["weights"].update(sha256=hashlib.sha256(content).hexdigest()))


def test_missing_files(saved, tmp_path):
    refused(tmp_path / "nowhere", r"plan\.json is missing")
    os.remove(saved / "model.safetensors")
    refused(saved, r"model\.safetensors is missing")


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(3, 4)),
        lambda: nn.Sequential(nn.Conv2d(3, 9, 3), *list(factory())[1:]),
    ],
)
def test_another_architecture(saved, make):
    refused(saved, "another architecture", make)


def test_a_factory_of_something_else(saved):
    refused(saved, "returned a int", lambda: 3)
    with pytest.raises(ZeroDivisionError):
        pw.load_pruned(saved, lambda: 1 / 0)


def test_a_factory_on_the_meta_device(saved):
    refused(saved, "on the meta device", lambda: factory().to("meta"))


def test_arguments_mixed_up(tmp_path, example):
    with pytest.raises(pw.PlanError, match="got a ChannelPlan and a Sequential"):
        pw.save_pruned(tmp_path, example[1], example[0])


def test_an_architecture_alike_in_names_and_shapes_only(saved):
    class Other(nn.Sequential):
        def forward(self, x):
            raise RuntimeError("never the same")

    refused(saved, "does not fit the Other", lambda: Other(*factory()))


@pytest.mark.parametrize("share", [0, 3, 8, 60, 0.5, 0.99])
def test_truncated_weights(saved, share):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: share if isinstance(share, int) else int(share * len(content))])
    refused(saved, "damaged|not the file that was saved")


@pytest.mark.parametrize("share", [0, 0.2, 0.7, 0.999])
def test_truncated_plans(saved, share):
    text = (saved / "plan.json").read_bytes()
    (saved / "plan.json").write_bytes(text[: int(share * (len(text) - 2))])
    refused(saved, "damaged")


def test_one_flipped_bit_and_an_added_byte(saved):
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    refused(saved, "SHA-256")
    content[-5] ^= 1
    path.write_bytes(content + b"\0")
    refused(saved, "belong to no tensor")


def test_weights_of_another_save(saved, tmp_path):
    pw.save_pruned(tmp_path / "other", *pruned(seed=7))
    shutil.copy(tmp_path / "other" / "model.safetensors", saved / "model.safetensors")
    refused(saved, "SHA-256|shape")


def set_path(*keys, to):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_path("kind", to="other"), "not a channel plan"),
        (set_path("schema_version", to=2), "schema version 2"),
        (set_path("fingerprint", to="0" * 16), "another architecture"),
        (set_path("fingerprint", to=3), "fingerprint"),
        (set_path("groups", to=[]), "groups"),
        (set_path("groups", "0", "keep", to=[]), "nothing is kept"),
        (set_path("groups", "0", "keep", to=[-1, 0]), "indices in"),
        (set_path("groups", "0", "keep", to=[0, 8]), "indices in"),
        (set_path("groups", "0", "keep", to=[1, 0]), "ascend"),
        (set_path("groups", "0", "keep", to=[0, 0]), "ascend"),
        (set_path("groups", "0", "keep", to=[True]), "indices in"),
        (set_path("groups", "0", "keep", to=[0.0]), "indices in"),
        (set_path("groups", "0", "keep", to=[10**30]), "indices in"),
        (set_path("groups", "0", "keep", to="01"), "keep"),
        (set_path("groups", "0", "size", to=-8), "size"),
        (set_path("groups", "0", "size", to=10**18), "units in the model"),
        (set_path("groups", "../../etc", to={"size": 8, "keep": [0]}), "does not have"),
        (set_path("groups", "5", to={"size": 5, "keep": [0]}), "5"),
        (set_path("groups", "0", "keep", to=[0]), "shape"),
        (set_path("inputs", to=None), "example_inputs"),
        (set_path("inputs", to={"tensor": [1 << 40], "dtype": "float32"}), "shape|GiB"),
        (set_path("inputs", to={"tensor": [1 << 20, 1 << 20], "dtype": "float32"}), "GiB"),
        (set_path("inputs", to={"tensor": [-1, 3, 8, 8], "dtype": "float32"}), "not one"),
        (set_path("inputs", to={"tensor": [2, 3, 8, 8], "dtype": "__class__"}), "dtype"),
        (set_path("inputs", to={"tensor": [2, 3, 9, 9], "dtype": "float32"}), "does not fit"),
        (set_path("inputs", to={"dict": {"self": 1}}), "does not fit"),
        (set_path("inputs", to={"import": "os"}), "not known"),
        (set_path("inputs", to={"tuple": [{"tuple": []}] * 3}), "does not fit"),
        (set_path("weights", to=None), "weights"),
        (set_path("weights", "format", to=9), "format 9"),
        (set_path("weights", "sha256", to="../../../etc/passwd"), "SHA-256"),
        (set_path("weights", "sha256", to="0" * 64), "SHA-256"),
        (set_path("weights", "tied", to=[["0.weight", "5.weight"]]), "different shapes"),
        (set_path("weights", "tied", to=[["0.weight", "0.weight"]]), "damaged"),
        (set_path("weights", "tied", to=[["a", "b"], ["b", "c"]]), "damaged"),
        (set_path("weights", "frozen", to=["nothing"]), "frozen"),
        (set_path("weights", "frozen", to=[["x"]]), "damaged"),
        (set_path("weights", "strides", to={"0.weight": [0, 0, 0, 0]}), "strides"),
        (set_path("weights", "strides", to={"0.weight": [1 << 40, 9, 3, 1]}), "strides"),
        (set_path("weights", "strides", to={"0.weight": [-1]}), "damaged"),
        (set_path("weights", "strides", to={"nothing": [1]}), "strides"),
        (set_path("weights", "training", to="yes"), "damaged"),
    ],
)
def test_plans_made_to_harm(saved, change, match):
    edit(saved, change)
    refused(saved, match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "expected a JSON object"),
        ("[" * 100_000, "nested too deep|damaged"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deep"),
        ('{"kind": 1, "kind": 2}', "'kind' stands there twice"),
        ('{"size": NaN}', "NaN"),
        ('{"size": -Infinity}', "Infinity"),
        ('{"size": ' + "9" * 10_000 + "}", "damaged"),
        ("\ud800", "damaged"),
        ("cos\nsystem\n(S'true'\ntR.", "damaged"),
        ("", "damaged"),
    ],
)
def test_json_made_to_harm(saved, text, match):
    (saved / "plan.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(saved, match)


def test_a_plan_of_a_gigabyte_is_not_read(saved):
    with (saved / "plan.json").open("wb") as file:
        file.truncate(1 << 30)  # sparse
    refused(saved, "larger than")


def nested_inputs(data):
    value = 1
    for _ in range(40):
        value = {"tuple": [value]}
    data["inputs"] = value


def test_inputs_nested_deep(saved):
    edit(saved, nested_inputs)
    refused(saved, "nested deeper")


def with_entry(**fields):
    def change(header):
        header["0.weight"] = {**header["0.weight"], **fields}

    return change


def renamed(header):
    header["other"] = header.pop("0.weight")


def dropped(header):
    del header["__metadata__"]
    del header["0.weight"]


def overlapping(header):
    names = [n for n in header if n != "__metadata__"]
    alike = {}
    for name in names:  # two tensors of one size, the second on top of the first
        start, end = header[name]["data_offsets"]
        if end - start in alike and end > start:
            header[name]["data_offsets"] = header[alike[end - start]]["data_offsets"]
            return
        alike[end - start] = name
    raise AssertionError


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (with_entry(shape=[1 << 60, 1 << 60]), "0.weight"),
        (with_entry(shape=[1 << 70]), "has the shape"),
        (with_entry(shape=[-3, -3, 3, 3]), "has the shape"),
        (with_entry(shape=[0, 1 << 61]), "does not take"),
        (with_entry(shape=[3.0]), "has the shape"),
        (with_entry(shape=[1] * 1000), "has the shape"),
        (with_entry(dtype="F16"), "does not take"),
        (with_entry(dtype="PICKLE"), "unknown dtype"),
        (with_entry(dtype=7), "lacks"),
        (with_entry(data_offsets=[0, 1 << 60]), "outside"),
        (with_entry(data_offsets=[-8, 0]), "outside"),
        (with_entry(data_offsets=[8, 0]), "outside"),
        (with_entry(data_offsets=[0]), "lacks"),
        (with_entry(more=1), "lacks"),
        (overlapping, "overlaps"),
        (renamed, "0.weight missing, other too many"),
        (dropped, "hole|overlaps"),
        (lambda h: {**h, "extra": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, "extra too many"),
        (lambda h: {**h, "../../x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, "too many"),
        (lambda h: {"__metadata__": 3}, "metadata"),
        (lambda h: [1], "expected a JSON object"),
    ],
)
def test_headers_made_to_harm(saved, change, match):
    forge(saved, change)
    refused(saved, match)


def test_headers_that_are_no_json(saved):
    forge(saved, raw=b"\x80\x04pickle")
    refused(saved, "damaged")
    forge_again = b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'
    path = saved / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(forge_again)) + forge_again + b"\0" * 4)
    refused(saved, "NaN")
    twice = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    path.write_bytes(struct.pack("<Q", len(twice)) + twice + b"\0" * 4)
    refused(saved, "twice")
    path.write_bytes(struct.pack("<Q", 1 << 63) + b"{}")
    refused(saved, "claims")


def test_dtype_of_another_kind(saved):
    def change(header):
        for name, entry in header.items():
            if name == "0.weight":
                entry["dtype"] = "I32"

    forge(saved, change)
    refused(saved, "int32")


def test_shape_of_the_same_size(saved):
    forge(saved, lambda h: h["5.weight"].update(shape=h["5.weight"]["shape"][::-1]))
    refused(saved, "5.weight' was saved with shape")


def test_symbolic_links_pipes_and_folders_are_not_read(saved, tmp_path):
    for name in ("plan.json", "model.safetensors"):
        path, away = saved / name, tmp_path / name
        shutil.move(path, away)
        path.symlink_to(away)
        refused(saved, "symbolic link")
        path.unlink()
        os.mkfifo(path)
        refused(saved, "not a regular file")
        path.unlink()
        path.mkdir()
        refused(saved, "regular file|cannot be read")
        path.rmdir()
        shutil.move(away, path)
    pw.load_pruned(saved, factory)


def test_saving_does_not_write_through_a_symbolic_link(saved, tmp_path, example):
    target = tmp_path / "precious"
    target.write_text("kept")
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors").symlink_to(target)
    pw.save_pruned(saved, *example)
    assert target.read_text() == "kept"
    assert same(pw.load_pruned(saved, factory), example[0], X)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_gives_anything_but_the_model_or_a_checkpoint_error(saved, example, data):
    name = data.draw(st.sampled_from(["plan.json", "model.safetensors"]))
    content = bytearray((saved / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = (content[at] + data.draw(st.integers(1, 255))) % 256
    folder = saved.parent / "damaged"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(content)
    try:
        loaded = pw.load_pruned(folder, factory)
    except pw.CheckpointError:
        return
    assert name == "plan.json"
    assert same(loaded, example[0], X)
