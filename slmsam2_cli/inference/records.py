"""What a folder of masks remembers: for every mask a record of what it was made from, and the manifest they add up to.

MASKS/.slmsam2/HASH.json  one mask: what it was made from (`key`), its digest, its account for the manifest
MASKS/manifest.json       the accounts of all masks that are there

A record says that the mask is about to be written before it is, and that it is done afterwards, so that a run which is
killed in between knows the mask for its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmsam2_cli.data import store
from slmsam2_cli.data.volume import files_of, image_ending, read_labels
from slmsam2_cli.errors import SlmSam2Error

MANIFEST = "manifest.json"
_FOLDER = ".slmsam2"
_TURN = ".slmsam2-manifest.lock"
Record = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """The records of one folder of masks."""

    masks: Path

    def read(self, case_id: str) -> Record:
        """The record of a case; empty when there is none that can be used."""
        record = _load(self._path(case_id))
        return record if record.get("case") == case_id else {}

    def begin(self, case_id: str) -> None:
        """The mask of this case is about to be written. OutputError."""
        store.write_json(self._path(case_id), {"format_version": 1, "case": case_id, "unfinished": True})

    def finish(self, case_id: str, key: str, account: Record) -> None:
        """The mask that `account` names as output is written. OutputError."""
        digest = store.sha256_of(self.masks / account["output"])
        record = {"format_version": 1, "case": case_id, "key": key, "sha256": digest, "account": account}
        store.write_json(self._path(case_id), record)

    def disown(self, case_id: str) -> str | None:
        """Mark an earlier mask of a case that now fails as out of date; the name of the mask, if there is one. OutputError."""
        record = self.read(case_id)
        if not self.intact(record):
            return None
        store.write_json(self._path(case_id), record | {"stale": True})
        return str(record["account"]["output"])

    def own_again(self, case_id: str) -> None:
        """What made the case fail is as it was before, and so is its mask. OutputError."""
        record = self.read(case_id)
        if record.pop("stale", False):
            store.write_json(self._path(case_id), record)

    def intact(self, record: Record) -> bool:
        """Whether the mask of a record is the one that was written."""
        path = self._mask(record)
        return path is not None and store.sha256_of(path) == record.get("sha256")

    def namesakes(self, case_id: str) -> list[Path]:
        """Files in the folder that carry the name of this case's mask."""
        if not self.masks.is_dir():
            return []
        return [p for p in sorted(self.masks.iterdir()) if (ending := image_ending(p)) and p.name[: -len(ending)] == case_id]

    def write_manifest(self, head: Record) -> None:
        """One account of the whole folder, from every record whose mask is there, under what `head` says of this run. OutputError.

        Runs that share the folder take turns, so that none writes a manifest of records older than those another has read.
        """
        with store.taking_turns(self.masks / _TURN):
            folder = self.masks / _FOLDER
            records = [_load(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
            kept = {r["case"]: r["account"] for r in records if not r.get("stale") and self._mask(r)}
            store.write_json(self.masks / MANIFEST, head | {"cases": {case: kept[case] for case in sorted(kept)}})

    def _path(self, case_id: str) -> Path:
        return self.masks / _FOLDER / f"{hashlib.sha256(case_id.encode()).hexdigest()[:32]}.json"

    def _mask(self, record: Record) -> Path | None:
        """The mask that a record speaks of, when it is there."""
        name = record.get("account", {}).get("output")
        path = self.masks / name if isinstance(name, str) and Path(name).name == name else None
        return path if path is not None and path.is_file() else None


def _load(path: Path) -> Record:
    """A record; empty when it is absent, damaged or none."""
    try:
        record = store.read_json(path, "record of a mask") if path.exists() else {}
    except SlmSam2Error:
        return {}
    whole = isinstance(record, dict) and isinstance(record.get("case"), str) and isinstance(record.get("account", {}), dict)
    return record if whole else {}


def whole(path: Path, case_id: str) -> bool:
    """Whether a file is a mask that can be read."""
    try:
        read_labels(path, case=case_id, root=path.parent)
    except SlmSam2Error:
        return False
    return True


def key_of(settings: str, inputs: Iterable[Path]) -> str:
    """Digest of everything that shapes a mask: the settings' digest and the content of its inputs; what cannot be read is absent."""
    return hashlib.sha256("\n".join([settings, *map(_content, inputs)]).encode()).hexdigest()


def _content(path: Path) -> str:
    """Digest of a volume: of its file, or of every file it consists of."""
    try:
        return " ".join(store.sha256_of(file) for file in ((path,) if path.is_dir() else files_of(path)))
    except (SlmSam2Error, OSError):
        return "absent"
