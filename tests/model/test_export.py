"""Exported models: the same bytes every time, and hostile or damaged zips are rejected."""

import hashlib
import io
import json
import stat
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save

from slmsam2_cli.errors import WeightsError
from slmsam2_cli.model import export
from slmsam2_cli.model.checkpoint import Checkpoint, Provenance, RequiredBase, tensors_digest
from slmsam2_cli.planning.plan import ChannelIntensity, GeometryPlan, NetworkPlan, Plan
from slmsam2_cli.planning.rules import choose_training

STATE = {"a": torch.arange(3.0)}
CONTENT = save(STATE)


def checkpoint(**changes):
    plan = Plan(
        tool_version="0",
        dataset_name="x",
        modality="MR",
        channels=("T1",),
        labels={1: "liver", 2: "spleen"},
        geometry=GeometryPlan(slice_axis="SI", in_plane_mm=1.0, through_plane_mm=None, input_size=64, crop_to_nonzero=True),
        intensity=(ChannelIntensity(name="T1", scheme="percentile", lower=0.5, upper=99.5),),
        network=NetworkPlan(size="nano"),
        training=choose_training("nano", 1).value,
        fingerprint_digest="0",
    )
    provenance = Provenance(pretrained="sam2.1-tiny", licence="Apache-2.0", training=("case",), steps=7)
    return Checkpoint(
        **{"name": "m", "state": STATE, "digest": tensors_digest(STATE), "network": plan.network, "plan": plan} | changes,
        provenance=provenance,
    )


def exported(**changes):
    return export.pack(checkpoint(**changes), CONTENT)


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezipped(files, listed=True, **entry):
    """A zip of these files as an exporter with other intentions might make it."""
    files = {name: content for name, content in files.items() if name != export.DIGESTS}
    if listed:
        files[export.DIGESTS] = "".join(f"{hashlib.sha256(c).hexdigest()}  {n}\n" for n, c in files.items()).encode()
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            for key, value in (entry if name == entry.get("only", name) else {}).items():
                if key != "only":
                    setattr(info, key, value)
            archive.writestr(info, content)
    return memory.getvalue()


def refused(data, match):
    with pytest.raises(WeightsError, match=match) as caught:
        export.unpack(io.BytesIO(data), "model.zip")
    assert str(caught.value).startswith("model.zip: ")


def test_a_packed_model_is_unpacked_with_plan_provenance_licence_and_readme():
    package = export.unpack(io.BytesIO(exported()), "model.zip")
    assert package.model == "model.safetensors" and package.files["model.safetensors"] == CONTENT
    assert set(package.files) == export.NAMES - {"adapter.safetensors", export.DIGESTS}
    assert json.loads(package.files["plan.json"])["labels"] == {"1": "liver", "2": "spleen"}
    assert b"Pretrained weights: sam2.1-tiny, Apache-2.0" in package.files["LICENSE.txt"]
    note = package.files["README.txt"].decode()
    assert "for MR: liver, spleen." in note and "7 steps on 1 case(s)" in note and "uncalibrated" in note


def test_the_same_model_gives_the_same_bytes():
    assert exported() == exported()
    with zipfile.ZipFile(io.BytesIO(exported())) as archive:
        assert {m.date_time for m in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.namelist() == sorted(archive.namelist())


def test_the_readme_of_an_adapter_names_its_base():
    data = exported(required_base=RequiredBase(name="sam2.1-tiny", digest="f" * 64))
    package = export.unpack(io.BytesIO(data), "adapter.zip")
    assert package.model == "adapter.safetensors" and b"sam2.1-tiny, weights " + b"f" * 64 in package.files["README.txt"]


def test_weights_without_a_plan_cannot_be_exported():
    with pytest.raises(WeightsError, match="has no plan inside"):
        exported(plan=None)


# Hostile and damaged zips


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/plan.json",
        "..\\plan.json",
        "C:plan.json",
        "plan.json/",
        "x.py",
        "PLAN.JSON",
        ".slmsam2.lock",
    ],
)
def test_unexpected_names_are_rejected(name):
    refused(rezipped(members(exported()) | {name: b"x"}), "unexpected file|contains a file twice|SHA256SUMS")


def test_a_link_is_rejected():
    refused(rezipped(members(exported()), external_attr=(stat.S_IFLNK | 0o777) << 16, only="plan.json"), "plan.json is a link")


def test_a_compressed_member_is_rejected_before_it_is_read():
    bomb = members(exported()) | {"README.txt": bytes(30 * 2**20)}
    refused(rezipped(bomb, compress_type=zipfile.ZIP_DEFLATED, only="README.txt"), "README.txt is compressed")


def test_a_text_file_above_the_limit_is_rejected():
    refused(rezipped(members(exported()) | {"README.txt": bytes(export.MAX_TEXT_BYTES + 1)}), "README.txt claims")


def test_a_member_larger_than_the_zip_is_rejected():
    data = bytearray(exported())
    start = data.index(b"PK\x01\x02")
    struct.pack_into("<II", data, start + 20, 2**30, 2**30)  # both sizes of the first member
    refused(bytes(data), "claims 1073741824 bytes|not a complete zip")


def test_a_duplicate_member_is_rejected():
    memory = io.BytesIO(exported())
    with zipfile.ZipFile(memory, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("plan.json", b"{}")
    refused(memory.getvalue(), "twice")


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "LICENSE.txt"])
def test_a_changed_byte_is_found_by_its_digest(name):
    files = members(exported())
    content = bytearray(files[name])
    content[0] ^= 1
    listing = files[export.DIGESTS]
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for member, held in (files | {name: bytes(content), export.DIGESTS: listing}).items():
            archive.writestr(member, held)
    refused(memory.getvalue(), f"{name} has another SHA-256")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f.pop("model.safetensors"), "contains none"),
        (lambda f: f.update({"adapter.safetensors": b"x"}), "contains model.safetensors and adapter.safetensors"),
        (lambda f: f.update({"about.json": b'{"format_version": 99, "model": "model.safetensors"}'}), "99 is newer"),
        (lambda f: f.update({"about.json": b'{"format_version": 1, "model": "model.safetensors"}'}), "1 was written by an earlier slmsam2"),
        (lambda f: f.update({"about.json": b'{"format_version": 1, "format_version": 1}'}), "about.json"),
        (lambda f: f.update({"about.json": b"[]"}), "not a JSON object"),
        (lambda f: f.pop("about.json"), "about.json is missing"),
    ],
)
def test_inconsistent_contents_are_rejected(change, match):
    files = members(exported())
    change(files)
    refused(rezipped(files), match)


def test_a_zip_without_digests_is_rejected():
    refused(rezipped(members(exported()), listed=False), "SHA256SUMS is missing")


@pytest.mark.parametrize("data", [b"", b"no zip at all", CONTENT])
def test_other_files_than_zips_are_rejected(data):
    refused(data, "not a complete zip")


def test_truncated_and_changed_zips_are_rejected_or_give_the_original_files():
    whole = exported()
    wanted = export.unpack(io.BytesIO(whole), "m").files
    changed = [whole[:k] for k in range(0, len(whole), 97)]
    for k in range(0, len(whole), 41):
        flipped = bytearray(whole)
        flipped[k] ^= 0x55
        changed.append(bytes(flipped))
    for data in changed:
        try:
            assert export.unpack(io.BytesIO(data), "m").files == wanted
        except WeightsError:
            pass


def test_a_plan_that_differs_from_the_one_inside_the_model_is_rejected():
    files = members(exported())
    other = json.loads(files["plan.json"]) | {"modality": "CT"}
    package = export.unpack(io.BytesIO(rezipped(files | {"plan.json": json.dumps(other).encode()})), "m")
    with pytest.raises(WeightsError, match="plan.json differs from the plan.json inside the model"):
        export.check_contents(package, checkpoint(), "m")
    export.check_contents(export.unpack(io.BytesIO(exported()), "m"), checkpoint(), "m")
