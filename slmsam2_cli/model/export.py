"""Exported models: one zip with weights, plan, provenance, licence, a readme, and the digest of each.

Packing is deterministic: the same model gives the same bytes. Unpacking rejects unknown names, links, compressed members and members of
excessive size before any is read, and checks every digest. Bytes in, bytes out: the caller reads and writes files.
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
from slmsam2_cli.io import atomic, strict_json
from slmsam2_cli.model.checkpoint import RANDOM_WARNING, Checkpoint
from slmsam2_cli.version import VERSION

FORMAT_VERSION = 2
MODELS = ("model.safetensors", "adapter.safetensors")
ABOUT, PLAN, PROVENANCE, LICENCE, README, DIGESTS = (
    *("about.json", "plan.json", "provenance.json"),
    *("LICENSE.txt", "README.txt", "SHA256SUMS"),
)
NAMES = frozenset({*MODELS, ABOUT, PLAN, PROVENANCE, LICENCE, README, DIGESTS})
MAX_BYTES, MAX_TEXT_BYTES = 4 * 2**30, 20 * 2**20
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date that a zip can record
_LICENCE = """The files of slmsam2 that made this model are under the Apache License, Version 2.0:
http://www.apache.org/licenses/LICENSE-2.0

The architecture is that of SAM 2 (Copyright Meta Platforms, Inc. and affiliates, Apache License, Version 2.0).

Pretrained weights: {pretrained}, {licence}.
Whoever trained this model decides on the terms for its fine-tuned weights, within those of the pretrained weights.
Unless required by applicable law or agreed to in writing, it is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR
CONDITIONS OF ANY KIND, either express or implied. It is not a medical device.
"""


@dataclass(frozen=True)
class Package:
    """A verified zip. model: which of MODELS it contains. files: name -> content, without the list of digests."""

    model: str
    files: Mapping[str, bytes]


def model_in(folder: Path) -> Path:
    """Return the path of the model in a folder, else of the adapter; without either, the path that the model would have."""
    return next((folder / name for name in MODELS if (folder / name).is_file()), folder / MODELS[0])


def pack(checkpoint: Checkpoint, content: bytes) -> bytes:
    """Pack a model file into a zip. content: the file's bytes.

    Raises: WeightsError for weights without plan and provenance.
    """
    if checkpoint.plan is None or checkpoint.provenance is None or checkpoint.network is None:
        raise WeightsError(f"{checkpoint.name}: has no plan inside, so it cannot be exported. Export a fine-tuned model")
    name = MODELS[1] if checkpoint.required_base else MODELS[0]
    provenance = checkpoint.provenance
    files = {
        name: content,
        ABOUT: atomic.to_json({"format_version": FORMAT_VERSION, "tool_version": VERSION, "model": name, "weights": checkpoint.digest}),
        PLAN: atomic.to_json(checkpoint.plan.model_dump(mode="json")),
        PROVENANCE: atomic.to_json(provenance.model_dump(mode="json")),
        LICENCE: _LICENCE.format(pretrained=provenance.pretrained, licence=provenance.licence or "licence not recorded").encode(),
        README: _readme(checkpoint, name).encode(),
    }
    files[DIGESTS] = "".join(f"{hashlib.sha256(files[n]).hexdigest()}  {n}\n" for n in sorted(files)).encode()
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_STORED) as archive:
        for member in sorted(files):
            entry = zipfile.ZipInfo(member, _ZIP_EPOCH)
            entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, files[member])
    return memory.getvalue()


def _readme(checkpoint: Checkpoint, name: str) -> str:
    """Describe a model for people. name: which of MODELS the zip contains."""
    plan, provenance, network = checkpoint.plan, checkpoint.provenance, checkpoint.network
    assert plan is not None and provenance is not None and network is not None
    table, required = checkpoint.calibration, checkpoint.required_base
    lines = [
        f"A model of slmsam2 {VERSION} for {plan.modality}: {', '.join(plan.labels[value] for value in sorted(plan.labels))}.",
        "",
        f"network     {network.size}, {network.policy}, {plan.geometry.input_size} px, slices along {plan.geometry.slice_axis}",
        *([f"channels    {', '.join(plan.channels)}, in this order"] if len(plan.channels) > 1 else []),
        f"training    {provenance.steps} steps on {len(provenance.training)} case(s), from {provenance.pretrained}",
        f"weights     {checkpoint.digest}",
        f"confidence  {f'calibrated with {table.slices} slices; {table.note}' if table else 'uncalibrated'}",
        *([f"adapter     for the base {required.name}, weights {required.digest}"] if required else []),
        *([f"warning     {RANDOM_WARNING}"] if provenance.random else []),
        "",
        "  slmsam2 import-model THIS.zip -o model",
        f"  slmsam2 predict -i scans -o masks -p prompts --model model{' --weights BASE' if name == MODELS[1] else ''}",
        "",
        "provenance.json names the training cases. The zip contains no images.",
    ]
    return "\n".join(lines) + "\n"


def unpack(file: BinaryIO, name: str) -> Package:
    """Read and verify a zip; nothing is written. name: of the zip, for messages.

    Raises: WeightsError, with the member and what is wrong with it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_members(members, name, file.seek(0, io.SEEK_END))
            files = {member.filename: archive.read(member) for member in members}
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, OSError) as error:
        raise WeightsError(f"{name}: not a complete zip ({str(error)[:160]}). Download or export it again") from None
    if DIGESTS not in files:
        raise WeightsError(f"{name}: {DIGESTS} is missing, so the files cannot be verified; archive rejected. Export it again")
    listed = dict(line.split("  ", 1)[::-1] for line in files.pop(DIGESTS).decode("ascii", "replace").splitlines() if "  " in line)
    if odd := sorted(set(listed) ^ set(files)):
        raise WeightsError(f"{name}: {ascii(odd[0])[:80]} is missing, or not listed in {DIGESTS}. Download or export it again")
    for called, content in files.items():
        if hashlib.sha256(content).hexdigest() != listed[called]:
            raise WeightsError(f"{name}: {called} has another SHA-256 than when it was exported. Download or export it again")
    about = read_json_member(files, ABOUT, name)
    version = about.get("format_version")
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise WeightsError(
            f"{name}: format version {version} was written by an earlier slmsam2 and is no longer supported (supported: {FORMAT_VERSION}). "
            "Fine-tune again, or use the slmsam2 that exported it"
        )
    if version != FORMAT_VERSION:
        raise WeightsError(f"{name}: format version {str(version)[:20]} is newer than the supported {FORMAT_VERSION}. Update slmsam2")
    held = [model for model in MODELS if model in files]
    if held != [about.get("model")]:
        raise WeightsError(f"{name}: must contain one model, contains {' and '.join(held) or 'none'}. Export it again")
    return Package(held[0], files)


def _check_members(members: list[zipfile.ZipInfo], name: str, size: int) -> None:
    """Check the directory of the zip before any member is read. size: of the zip in bytes.

    Raises: WeightsError when a member has another name, is no regular file, or is compressed, too large or there twice.
    """
    for member in members:
        called, limit = member.filename, MAX_BYTES if member.filename in MODELS else MAX_TEXT_BYTES
        kind = stat.S_IFMT(member.external_attr >> 16)
        if member.orig_filename not in NAMES or called not in NAMES:
            raise WeightsError(f"{name}: unexpected file {ascii(member.orig_filename)[:80]}; archive rejected")
        if kind not in (0, stat.S_IFREG) or member.is_dir():
            raise WeightsError(f"{name}: {called} is a link or not a regular file; archive rejected")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 0x1 or member.compress_size != member.file_size:
            raise WeightsError(f"{name}: {called} is compressed or encrypted, unlike in an exported model; archive rejected")
        if member.file_size > min(limit, size):
            raise WeightsError(f"{name}: {called} claims {member.file_size} bytes, which is too large; archive rejected")
    if len({member.filename for member in members}) != len(members):
        raise WeightsError(f"{name}: contains a file twice; archive rejected")


def read_json_member(files: Mapping[str, bytes], called: str, name: str) -> dict[str, Any]:
    """Parse a member as a JSON object.

    Raises: WeightsError when it is missing or no JSON object.
    """
    try:
        value = strict_json.parse(files[called])
    except KeyError:
        raise WeightsError(f"{name}: {called} is missing. Export it again") from None
    except strict_json.JsonRejected as error:
        raise WeightsError(f"{name}: {called}: {error}. Export it again") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{name}: {called} is not a JSON object. Export it again")
    return value


def check_contents(package: Package, checkpoint: Checkpoint, name: str) -> None:
    """Compare plan, provenance and digest in the zip with those in the header of its model file.

    Raises: WeightsError when they differ.
    """
    for called, inside in ((PLAN, checkpoint.plan), (PROVENANCE, checkpoint.provenance)):
        found = read_json_member(package.files, called, name)
        if inside is None or found != json.loads(inside.model_dump_json()):
            raise WeightsError(f"{name}: {called} differs from the {called} inside the model. Export it again")
    if read_json_member(package.files, ABOUT, name).get("weights") != checkpoint.digest:
        raise WeightsError(f"{name}: {ABOUT} has another digest than the weights. Export it again")
