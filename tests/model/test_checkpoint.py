"""Model files: round trip, strict reading, rejected files, adapters and label U-Nets inside them."""

import io
import json
import pickle
import struct
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save

from slmsam2_cli.errors import WeightsError
from slmsam2_cli.model import adapters
from slmsam2_cli.model.calibration import calibrate
from slmsam2_cli.model.checkpoint import (
    Checkpoint,
    Provenance,
    RequiredBase,
    combine_with_base,
    label_unet_of,
    load_base_weights,
    load_weights,
    read_checkpoint,
    resolve_adapter,
    save_adapter,
    save_checkpoint,
    tensors_digest,
)
from slmsam2_cli.model.label_unet import LabelUNet
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import AdapterPlan, ChannelIntensity, GeometryPlan, NetworkPlan, Plan
from slmsam2_cli.planning.rules import choose_training

PX = 32


def build(seed=0, **network):
    torch.manual_seed(seed)
    return SlmSam2(NetworkPlan(size="nano", **network), PX)


@pytest.fixture(scope="module")
def plan():
    return Plan(
        tool_version="0",
        dataset_name="x",
        modality="MR",
        channels=("T1",),
        labels={1: "organ"},
        geometry=GeometryPlan(slice_axis="SI", in_plane_mm=1.0, through_plane_mm=None, input_size=PX, crop_to_nonzero=True),
        intensity=(ChannelIntensity(name="T1", scheme="percentile", lower=0.5, upper=99.5),),
        network=NetworkPlan(size="nano"),
        training=choose_training("nano", 1).value,
        fingerprint_digest="0",
    )


@pytest.fixture
def written(tmp_path, plan):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build(), plan, Provenance(pretrained="random", random=True, training=("a",)))
    return path


def test_a_saved_model_is_read_back_with_plan_provenance_and_digest(written, plan):
    checkpoint = read_checkpoint(written)
    assert checkpoint.plan == plan
    assert checkpoint.provenance == Provenance(pretrained="random", random=True, training=("a",))
    assert checkpoint.digest == tensors_digest(build().state_dict())


def test_the_digest_depends_on_values_but_not_on_the_order_of_tensors():
    state = {"a": torch.zeros(2), "b": torch.ones(3)}
    assert tensors_digest(state) == tensors_digest(dict(reversed(state.items())))
    assert tensors_digest(state) != tensors_digest({**state, "a": torch.tensor([0.0, 1e-30])})


def test_loading_weights_gives_the_same_model(written):
    model = build(seed=1)
    load_weights(model, read_checkpoint(written))
    assert tensors_digest(model.state_dict()) == read_checkpoint(written).digest


def test_a_trained_short_stack_is_loaded_and_not_replaced_by_the_long_one(written):
    tuned = build()
    with torch.no_grad():
        tuned.short_memory_attention.norm.weight.add_(1.0)
    model = build(seed=1)
    load_weights(model, Checkpoint("tuned", tuned.state_dict(), ""))
    assert torch.equal(model.short_memory_attention.norm.weight, tuned.short_memory_attention.norm.weight)
    assert not torch.equal(model.short_memory_attention.norm.weight, model.memory_attention.norm.weight)


def test_from_weights_without_a_short_stack_it_starts_as_a_copy_of_the_long_one():
    base = build(policy="fifo").state_dict()
    model = build(seed=1)
    load_weights(model, Checkpoint("base", base, ""))
    long, short = model.memory_attention.state_dict(), model.short_memory_attention.state_dict()
    assert all(torch.equal(long[name], short[name]) and torch.equal(long[name], base[f"memory_attention.{name}"]) for name in long)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("no_mem_embed"), "missing: no_mem_embed"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda s: s.update(no_mem_embed=torch.zeros(1, 1, 3)), r"of another shape: no_mem_embed \[1, 1, 3\] for \[1, 1, 128\]"),
        (lambda s: s.pop("short_memory_attention.norm.weight"), "missing: short_memory_attention.norm.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_rejected_by_name(change, message):
    state = dict(build().state_dict())
    change(state)
    with pytest.raises(WeightsError, match=message):
        load_weights(build(), Checkpoint("model", state, ""))


def test_a_file_with_a_changed_byte_is_rejected(written):
    content = bytearray(written.read_bytes())
    content[-3] ^= 1
    written.write_bytes(bytes(content))
    with pytest.raises(WeightsError, match="corrupt"):
        read_checkpoint(written)


def test_a_truncated_file_is_rejected(written):
    written.write_bytes(written.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="truncated"):
        read_checkpoint(written)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("9999", "model.safetensors: format version 9999 is newer than the supported 2. Update slmsam2"),
        ("x", "model.safetensors: format version x is newer"),
        ("1", "model.safetensors: format version 1 was written by an earlier slmsam2 and is no longer supported .* Fine-tune again"),
    ],
)
def test_another_format_version_is_rejected_with_a_way_out(tmp_path, version, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"a": torch.zeros(1)}, {"format_version": version}))
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(path)


def test_the_bundled_model_has_the_weights_of_its_digest_and_the_current_provenance():
    bundled = load_base_weights("auto")
    assert bundled.digest == "37b3ee3eece554f358515f621a99f9c7408b2ef0e55e10987d2c1a47cd2c3c14"
    assert bundled.provenance.pretrained == "procedural volumes" and bundled.provenance.object_score_offset == 0.7


class Boom:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def torch_zip(payload, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


@pytest.mark.parametrize("wrap", [lambda p: p, torch_zip])
def test_code_inside_a_pickle_is_never_run(tmp_path, wrap):
    marker, path = tmp_path / "PWNED", tmp_path / "model.pt"
    path.write_bytes(wrap(pickle.dumps({"model": Boom(str(marker))}, 2)))
    with pytest.raises(WeightsError, match="unsafe|safely"):
        read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.pt", b"", "empty"),
        ("model.pt", b"404: Not Found\n", "not a checkpoint"),
        ("model.pt", torch_zip(pickle.dumps({"a": 1}, 2))[:-40], "corrupt or truncated"),
        ("model.pt", torch_zip(pickle.dumps({}, 2)), "no tensors"),
        ("model.pt", torch_zip(bytes(2**20), zipfile.ZIP_DEFLATED), "compressed or too large"),
        ("model.safetensors", struct.pack("<Q", 2**40) + b"{}", "corrupt"),
        ("plans.json", json.dumps({"format_version": 9999}).encode(), "newer"),
        ("plans.json", b"[]", "is no model, and no valid plan"),
    ],
)
def test_files_that_are_no_checkpoint_are_rejected_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(tmp_path / name)


def test_a_sam2_checkpoint_in_torchs_own_format_is_read(tmp_path):
    state = build(policy="fifo").state_dict()
    torch.save({"model": state}, tmp_path / "sam2.pt")
    checkpoint = read_checkpoint(tmp_path / "sam2.pt")
    assert checkpoint.plan is None and checkpoint.digest == tensors_digest(state)
    load_weights(build(seed=1), checkpoint)


def test_the_error_for_an_absent_file_names_the_model_option(tmp_path):
    with pytest.raises(WeightsError, match="--model"):
        read_checkpoint(tmp_path / "absent.safetensors")


def test_the_name_random_means_no_weights():
    assert load_base_weights("random") is None


def test_a_model_file_has_exactly_the_tensors_of_the_network(written):
    assert set(load_file(written)) == set(build().state_dict())


# Adapters


def adapted(seed=0, modality="MR"):
    """A model with one adapter in use that changes the output."""
    model = build(seed)
    adapters.add(model, modality, AdapterPlan(rank=2))
    adapters.use(model, modality)
    with torch.no_grad():
        for parameter in [*adapters.branch_parameters(model, modality), *adapters.tuned_parameters(model).values()]:
            parameter.add_(0.1)
    return model


def base_of(seed=0):
    state = build(seed).state_dict()
    return Checkpoint(f"base{seed}", state, tensors_digest(state))


@pytest.fixture
def adapter_file(tmp_path, plan):
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapted(), plan, Provenance(pretrained="base0"), RequiredBase(name="base0", digest=base_of().digest))
    return path


def test_loading_switches_to_the_adapter_of_the_requested_modality(tmp_path, plan):
    path = tmp_path / "model.safetensors"
    digest = save_checkpoint(path, adapted(), plan, Provenance(pretrained="base0"))
    checkpoint = read_checkpoint(path)
    assert checkpoint.digest == digest and checkpoint.modalities == ("MR",)
    assert checkpoint.base_digest == base_of().digest
    used, unused = build(seed=1), build(seed=1)
    load_weights(used, checkpoint, "MR")
    load_weights(unused, checkpoint, "CT")
    assert tensors_digest(used.state_dict()) == tensors_digest(adapted().state_dict())
    assert used.adapters.active == "MR" and unused.adapters.active is None
    assert torch.equal(unused.stream_fuser.gate, build().stream_fuser.gate)


def test_an_adapter_file_is_under_30_percent_of_the_model_and_equal_on_its_base(adapter_file):
    checkpoint = combine_with_base(read_checkpoint(adapter_file), base_of())
    assert adapter_file.stat().st_size < 0.3 * sum(t.nbytes for t in build().state_dict().values())
    model = build(seed=1)
    load_weights(model, checkpoint, "MR")
    assert tensors_digest(model.state_dict()) == tensors_digest(adapted().state_dict())


def test_an_adapter_on_another_base_is_rejected_with_both_digests(adapter_file):
    with pytest.raises(WeightsError) as caught:
        combine_with_base(read_checkpoint(adapter_file), base_of(seed=3))
    assert base_of().digest[:12] in str(caught.value) and base_of(seed=3).digest[:12] in str(caught.value)


def test_an_adapter_without_its_base_is_rejected_with_the_name_of_the_base(adapter_file, tmp_path, monkeypatch):
    adapter = read_checkpoint(adapter_file)
    with pytest.raises(WeightsError, match="adapter for the base base0 .*--weights"):
        load_weights(build(), adapter)
    monkeypatch.setattr("slmsam2_cli.model.checkpoint.BUNDLED_WEIGHTS", tmp_path / "absent")
    with pytest.raises(WeightsError, match="--weights"):
        resolve_adapter(adapter, None)
    with pytest.raises(WeightsError, match="Random weights are not that base"):
        resolve_adapter(adapter, "random")


def test_the_base_of_an_adapter_may_be_a_file_with_another_adapter(adapter_file, tmp_path, plan):
    path = tmp_path / "ct.safetensors"
    save_checkpoint(path, adapted(modality="CT"), plan, Provenance(pretrained="base0"))
    both = resolve_adapter(read_checkpoint(adapter_file), str(path))
    assert set(both.modalities) == {"MR", "CT"} and both.required_base is None


def test_the_calibration_is_read_back(tmp_path, plan):
    path, found = tmp_path / "model.safetensors", calibrate([k / 40 for k in range(40)], [k / 50 for k in range(40)])
    save_checkpoint(path, build(), plan, Provenance(pretrained="base0"), found)
    assert read_checkpoint(path).calibration == found


def with_label_unet(labels, seed=0):
    """A model with a label U-Net of these labels."""
    model = build(seed)
    model.label_unet = LabelUNet(1, labels, 32, width=8)
    return model


def test_a_label_unet_is_saved_with_the_model_and_read_back(tmp_path, plan):
    made, path = with_label_unet([1]), tmp_path / "model.safetensors"
    save_checkpoint(path, made, plan, Provenance(pretrained="nano"))
    found = label_unet_of(read_checkpoint(path))
    assert found.values == [1]
    assert all(torch.equal(tensor, made.label_unet.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_the_label_unet_of_a_base_is_not_loaded_and_not_part_of_the_base_digest(tmp_path, plan):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, with_label_unet([1]), plan, Provenance(pretrained="nano"))
    base, fresh = read_checkpoint(path), with_label_unet([5], seed=1)
    before = {name: tensor.clone() for name, tensor in fresh.label_unet.state_dict().items()}
    load_weights(fresh, base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.label_unet.state_dict().items())
    assert base.base_digest == tensors_digest(build().state_dict()) != base.digest


def test_an_adapter_brings_its_own_label_unet_to_a_base_that_has_another(tmp_path, plan):
    base_path, path = tmp_path / "base.safetensors", tmp_path / "adapter.safetensors"
    save_checkpoint(base_path, with_label_unet([1]), plan, Provenance(pretrained="nano"))
    base, model = read_checkpoint(base_path), with_label_unet([7])
    adapters.add(model, "MR", AdapterPlan(), 0)
    save_adapter(path, model, plan, Provenance(pretrained="nano"), RequiredBase(name="base", digest=base.base_digest))
    assert label_unet_of(combine_with_base(read_checkpoint(path), base)).values == [7]


def test_a_damaged_label_unet_is_rejected_with_the_name_of_the_file(tmp_path, plan):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, with_label_unet([1]), plan, Provenance(pretrained="nano"))
    whole = read_checkpoint(path)
    broken = replace(whole, state={name: tensor for name, tensor in whole.state.items() if name != "label_unet.labels"})
    with pytest.raises(WeightsError, match="model.safetensors: corrupt: the label U-Net is incomplete"):
        label_unet_of(broken)
