"""A model as one zip to hand on: weights, plan, provenance, licence, a note for people, and the digest of each.

Packing is deterministic: the same model gives the same bytes. Unpacking trusts nothing: names come from a list, nothing
is a link, nothing is compressed, sizes are known before anything is read, and every digest is checked. Bytes in, bytes
out; files are the caller's.
"""

from __future__ import annotations

import hashlib
import io
import json
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from slmsam2_cli.errors import WeightsError
from slmsam2_cli.io import strict_json
from slmsam2_cli.model.checkpoint import RANDOM_WARNING, Checkpoint
from slmsam2_cli.version import VERSION

FORMAT_VERSION = 1
MODELS = ("model.safetensors", "adapter.safetensors")
ABOUT, PLAN, PROVENANCE, LICENCE, README, DIGESTS = (
    *("about.json", "plan.json", "provenance.json"),
    *("LICENSE.txt", "README.txt", "SHA256SUMS"),
)
NAMES = frozenset({*MODELS, ABOUT, PLAN, PROVENANCE, LICENCE, README, DIGESTS})
MOST_BYTES, MOST_TEXT = 4 * 2**30, 20 * 2**20
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # of time, for a zip
_LICENCE = """The files of slmsam2 that made this model are under the Apache License, Version 2.0:
http://www.apache.org/licenses/LICENSE-2.0

The architecture is that of SAM 2 (Copyright Meta Platforms, Inc. and affiliates, Apache License, Version 2.0).

Weights of the base: {base}, {licence}.
Whoever trained this model decides on the terms for what was learned on top of the base, within the base's own.
Unless required by applicable law or agreed to in writing, it is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR
CONDITIONS OF ANY KIND, either express or implied. It is no medical device.
"""


@dataclass(frozen=True)
class Package:
    """What was found in a zip and proved whole. model: which of MODELS; files: name -> content, without the list of digests."""

    model: str
    files: Mapping[str, bytes]


def model_in(folder: Path) -> Path:
    """The model in a folder, else the adapter; where there is neither, the model that should be there."""
    return next((folder / name for name in MODELS if (folder / name).is_file()), folder / MODELS[0])


def pack(checkpoint: Checkpoint, content: bytes) -> bytes:
    """The zip of a model file of this tool. content: the file's bytes. WeightsError for weights without plan and provenance."""
    if checkpoint.plan is None or checkpoint.provenance is None or checkpoint.network is None:
        raise WeightsError(f"{checkpoint.name}: carries no plan, so it is no model that could be used elsewhere. Export a fine-tuned one")
    name = MODELS[1] if checkpoint.required_base else MODELS[0]
    provenance = checkpoint.provenance
    files = {
        name: content,
        ABOUT: strict_json.dump({"format_version": FORMAT_VERSION, "tool_version": VERSION, "model": name, "weights": checkpoint.digest}),
        PLAN: strict_json.dump(checkpoint.plan.model_dump(mode="json")),
        PROVENANCE: strict_json.dump(provenance.model_dump(mode="json")),
        LICENCE: _LICENCE.format(base=provenance.pretrained, licence=provenance.licence or "terms not recorded").encode(),
        README: _readme(checkpoint, name).encode(),
    }
    files[DIGESTS] = "".join(f"{hashlib.sha256(files[n]).hexdigest()}  {n}\n" for n in sorted(files)).encode()
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_STORED) as archive:
        for member in sorted(files):
            archive.writestr(_entry(member), files[member])
    return memory.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
    entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
    return entry


def _readme(checkpoint: Checkpoint, name: str) -> str:
    plan, provenance, network = checkpoint.plan, checkpoint.provenance, checkpoint.network
    assert plan is not None and provenance is not None and network is not None
    table = checkpoint.calibration
    lines = [
        f"A model of slmsam2 {VERSION}, for {plan.modality}: {', '.join(plan.labels[value] for value in sorted(plan.labels))}.",
        "",
        f"network     {network.size}, {network.policy}, {plan.geometry.input_size} px, slices along {plan.geometry.slice_axis}",
        *([f"channels    {', '.join(plan.channels)}, in this order"] if len(plan.channels) > 1 else []),
        f"learned     {provenance.steps} steps on {len(provenance.training)} case(s), from {provenance.pretrained}",
        f"weights     {checkpoint.digest}",
        f"confidence  {f'calibrated with {table.slices} slices, {table.note}' if table else 'uncalibrated'}",
        *(
            [f"adapter     for the base {checkpoint.required_base.name}, weights {checkpoint.required_base.digest}"]
            if checkpoint.required_base
            else []
        ),
        *([f"warning     {RANDOM_WARNING}"] if provenance.random else []),
        "",
        "  slmsam2 import-model THIS.zip -o model",
        f"  slmsam2 predict -i scans -o masks -p prompts --model model{' --weights BASE' if name == MODELS[1] else ''}",
        "",
        "provenance.json names the cases it learned from. It holds no images.",
    ]
    return "\n".join(lines) + "\n"


def unpack(file: BinaryIO, name: str) -> Package:
    """What is in a zip, after every check. WeightsError says what is wrong with which member; nothing is written."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_members(members, name, file.seek(0, io.SEEK_END))
            files = {member.filename: archive.read(member) for member in members}
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, OSError) as error:
        raise WeightsError(f"{name}: not a whole zip ({str(error)[:160]}). Fetch or export it again") from None
    _check_digests(files, name)
    return Package(_model_in(files, name), files)


def _check_members(members: list[zipfile.ZipInfo], name: str, size: int) -> None:
    """Everything that can be said from the directory of the zip, before any member is read."""
    for member in members:
        called, limit = member.filename, MOST_BYTES if member.filename in MODELS else MOST_TEXT
        kind = stat.S_IFMT(member.external_attr >> 16)
        if member.orig_filename not in NAMES or called not in NAMES:
            raise WeightsError(
                f"{name}: holds {ascii(member.orig_filename)[:80]}, which is no part of an exported model. Nothing was taken from it"
            )
        if kind not in (0, stat.S_IFREG) or member.is_dir():
            raise WeightsError(f"{name}: {called} is a link or no plain file. Nothing was taken from it")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 0x1 or member.compress_size != member.file_size:
            raise WeightsError(f"{name}: {called} is compressed or encrypted, which no export is. Nothing was taken from it")
        if member.file_size > min(limit, size):
            raise WeightsError(f"{name}: {called} claims {member.file_size} bytes, more than it may have. Nothing was taken from it")
    if len({member.filename for member in members}) != len(members):
        raise WeightsError(f"{name}: holds a file twice. Nothing was taken from it")


def _check_digests(files: dict[str, bytes], name: str) -> None:
    """Every file is the one that was listed, and no other; the list itself is taken out."""
    if DIGESTS not in files:
        raise WeightsError(f"{name}: {DIGESTS} is missing, so nothing in it can be trusted. Export it again")
    listed = dict(line.split("  ", 1)[::-1] for line in files.pop(DIGESTS).decode("ascii", "replace").splitlines() if "  " in line)
    if odd := sorted(set(listed) ^ set(files)):
        raise WeightsError(f"{name}: {ascii(odd[0])[:80]} is missing, or not in {DIGESTS}. Fetch or export it again")
    for called, content in files.items():
        if hashlib.sha256(content).hexdigest() != listed[called]:
            raise WeightsError(f"{name}: {called} is not the file that was exported: its SHA-256 differs. Fetch or export it again")


def _model_in(files: Mapping[str, bytes], name: str) -> str:
    about = document(files, ABOUT, name)
    version = about.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise WeightsError(f"{name}: format version {str(version)[:20]} is newer than this tool's {FORMAT_VERSION}. Update slmsam2")
    held = [model for model in MODELS if model in files]
    if held != [about.get("model")]:
        raise WeightsError(f"{name}: should hold one model, holds {' and '.join(held) or 'none'}. Export it again")
    return held[0]


def document(files: Mapping[str, bytes], called: str, name: str) -> dict[str, Any]:
    """A JSON object in the zip. WeightsError."""
    try:
        value = strict_json.parse(files[called])
    except KeyError:
        raise WeightsError(f"{name}: {called} is missing. Export it again") from None
    except strict_json.JsonRejected as error:
        raise WeightsError(f"{name}: {called}: {error}. Export it again") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{name}: {called} is no JSON object. Export it again")
    return value


def check_contents(package: Package, checkpoint: Checkpoint, name: str) -> None:
    """What stands beside the model is what stands inside it. WeightsError."""
    for called, inside in ((PLAN, checkpoint.plan), (PROVENANCE, checkpoint.provenance)):
        said = document(package.files, called, name)
        if inside is None or said != json.loads(inside.model_dump_json()):
            raise WeightsError(f"{name}: {called} is not that of the model beside it. Export it again")
    if document(package.files, ABOUT, name).get("weights") != checkpoint.digest:
        raise WeightsError(f"{name}: {ABOUT} names other weights than those beside it. Export it again")
