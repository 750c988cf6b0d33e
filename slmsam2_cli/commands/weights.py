"""Weights: published ones -> this user's cache.   Reads the network (get alone), files.   Writes the cache, in zoo.folder().

The cache holds fetched files as they were published, a NAME.sha256 beside those that nobody published a digest of, and
imported ones as NAME.safetensors.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from slmsam2_cli import console
from slmsam2_cli.errors import DONE, SOME_FAILED, UsageError, WeightsError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.download import DownloadError, DownloadTarget, fetch
from slmsam2_cli.io.files import InputError, error_reason, sha256_of
from slmsam2_cli.io.strict_json import JsonRejected, parse
from slmsam2_cli.model import zoo
from slmsam2_cli.model.zoo import Entry

if TYPE_CHECKING:  # torch is loaded by the two commands that look at tensors
    from torch import Tensor

    from slmsam2_cli.model.checkpoint import Checkpoint

_LIST_COLUMNS = ["name", "MB", "network", "licence", "here", "verified", "note"]
_VERIFY_COLUMNS = ["name", "SHA-256", "layout", "network", "tensors", "digest compared with"]


def list_weights() -> int:
    """A table of what is known by name and what is here. The exit code: 0."""
    rows = [_embedded_row()] if zoo.installed_path(zoo.BUNDLED_NAME) else []
    rows += [_published_row(entry) for entry in zoo.ENTRIES]
    rows += [_imported_row(name) for name in zoo.imported() if zoo.find(name) is None]
    console.table("weights", _LIST_COLUMNS, rows)
    console.say(f"kept in {zoo.folder()}")
    return DONE


def _embedded_row() -> list[str]:
    size = _megabytes(zoo.BUNDLED_WEIGHTS.stat().st_size)
    return [zoo.BUNDLED_NAME, size, "nano", "Apache-2.0", "yes", "when read", "comes with slmsam2; --weights auto"]


def _published_row(entry: Entry) -> list[str]:
    path = zoo.installed_path(entry.name)
    verified = "-" if path is None else "when imported" if path.suffix == ".safetensors" else "when fetched"
    if path is not None and entry.sha256 is None and path.suffix != ".safetensors":
        verified = "no published hash"
    size = _megabytes(entry.bytes) if entry.bytes else "?"
    return [entry.name, size, entry.size, entry.licence, "yes" if path else "no", verified, entry.note or entry.family]


def _imported_row(name: str) -> list[str]:
    path = zoo.folder() / f"{name}.safetensors"
    network, provenance = _header(path)
    size, licence = str(network.get("size", "?")), str(provenance.get("licence") or "unknown")
    return [
        name,
        _megabytes(path.stat().st_size),
        size,
        licence,
        "yes",
        "when imported",
        f"imported from {provenance.get('pretrained') or 'a file'}",
    ]


def _header(path: Path) -> tuple[dict[str, object], dict[str, object]]:
    """Network and provenance as the header of one of our files has them; empty when it cannot be read."""
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
        network, provenance = (parse(header.get(key, "{}").encode()) for key in ("network", "provenance"))
    except (SafetensorError, OSError, ValueError, struct.error, JsonRejected):
        return {}, {}
    return (network, provenance) if isinstance(network, dict) and isinstance(provenance, dict) else ({}, {})


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}"


def get(name: str, *, output: Path | None = None, sha256: str | None = None, url: str | None = None) -> int:
    """Fetch published weights into this user's cache, or a folder. The exit code: 0.

    UsageError for an unknown name or digest, DownloadError, DigestError, OutputError, LockError.
    """
    entry = _entry(name)
    folder = output if output is not None else zoo.folder()
    wanted = DownloadTarget(url or entry.url, folder / entry.file, entry.bytes, _expected_digest(entry, sha256))
    with atomic.lock_folder(folder, entry.name):
        if _already_downloaded(wanted, entry):
            console.say(f"{name} is here already and unchanged: {wanted.path}")
        else:
            _fetch(wanted, entry)
    console.say(f"licence: {entry.licence}" + (f" ({entry.note})" if entry.note else ""))
    console.say(
        f"use it with --weights {name if output is None else wanted.path} (network {entry.size}: slmsam2 plan --network {entry.size})"
    )
    return DONE


def _entry(name: str) -> Entry:
    entry = zoo.find(name)
    if entry is None:
        names = ", ".join(entry.name for entry in zoo.ENTRIES)
        raise UsageError(f"{name}: no published weights of that name. Known are {names}")
    return entry


def _expected_digest(entry: Entry, sha256: str | None) -> str | None:
    """The digest a file must have: the published one, the one that was pinned, or None."""
    if sha256 is None:
        return entry.sha256
    given = sha256.strip().lower().removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-f]{64}", given):
        raise UsageError(f"--sha256 {sha256}: not a SHA-256, which has 64 digits from 0 to f")
    if entry.sha256 is not None and given != entry.sha256:
        raise UsageError(f"--sha256 {given[:12]}… is not the digest published for {entry.name}, {entry.sha256[:12]}…. Leave it out")
    return given


def _already_downloaded(wanted: DownloadTarget, entry: Entry) -> bool:
    """Whether the file is there and is the one that is wanted; a changed one is said and fetched again."""
    known = wanted.sha256 or zoo.recorded_digest(wanted.path)
    if not wanted.path.is_file() or known is None:
        return False
    if sha256_of(wanted.path) == known:
        return True
    console.warn(f"{wanted.path} is not {entry.name} as it was published; it is fetched again")
    return False


def _fetch(wanted: DownloadTarget, entry: Entry) -> None:
    console.say(f"fetching {wanted.url}")
    try:
        with _ProgressBar(entry.name) as bar:
            digest = fetch(wanted, bar.report, console.say)
    except DownloadError as error:
        kept = "What has arrived is kept: run the same command again" if wanted.partial.exists() else "Run the same command later"
        raise DownloadError(
            f"{error}. {kept}. Or fetch {wanted.url} on any computer, and run slmsam2 weights import FILE --name {entry.name}"
        ) from None
    console.say(f"{entry.name}: {wanted.path} ({_megabytes(wanted.path.stat().st_size)} MB)")
    if entry.sha256 is not None:
        console.say(f"its SHA-256 is the published one: {digest}")
        return
    atomic.write_text(wanted.path.with_name(wanted.path.name + ".sha256"), f"{digest}  {wanted.path.name}\n")
    if wanted.sha256 is None:
        console.warn(f"no published hash is known for this file; its digest after download is {digest}; pin it with --sha256")


@dataclass
class _ProgressBar:
    """A progress bar in megabytes that opens when the length is known."""

    name: str
    stack: ExitStack = field(default_factory=ExitStack)
    advance: console.Advance | None = None
    shown: int = 0

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def report(self, have: int, total: int | None) -> None:
        if self.advance is None:
            if total is None:
                return
            self.advance = self.stack.enter_context(console.progress(f"{self.name}, MB", -(-total // 1_000_000)))
        now = -(-have // 1_000_000)
        if now != self.shown:
            self.advance(now - self.shown)
            self.shown = now


def verify(target: str | None) -> int:
    """Compare digests and tensors of one, or of all weights that are here. The exit code: 0, or 1 when one of several is bad.

    WeightsError when the one that was named is bad or absent.
    """
    found = [_named(target)] if target is not None else list(_installed_weights())
    if not found:
        console.say(f"no weights are here ({zoo.folder()}). slmsam2 weights list shows which there are")
        return DONE
    rows, failed = [], False
    for name, path in found:
        try:
            rows.append(_verified_row(name, path))
        except WeightsError as error:
            if target is not None:
                raise
            console.error(str(error))
            failed = True
    if rows:
        console.table("verified", _VERIFY_COLUMNS, rows)
    return SOME_FAILED if failed else DONE


def _named(target: str) -> tuple[str, Path]:
    path = zoo.installed_path(target) if zoo.NAME.fullmatch(target) else None
    return (target, path) if path is not None else (target, zoo.locate(target))


def _installed_weights() -> Iterator[tuple[str, Path]]:
    names = [zoo.BUNDLED_NAME, *(entry.name for entry in zoo.ENTRIES), *zoo.imported()]
    for name in dict.fromkeys(names):
        if (path := zoo.installed_path(name)) is not None:
            yield name, path


def _verified_row(name: str, path: Path) -> list[str]:
    """Digest, layout and tensors of one file. WeightsError when something is wrong with it."""
    from slmsam2_cli.model import checkpoint

    digest = _sha256(path)
    entry = zoo.find(name) or zoo.find_by_digest(digest)
    zoo.verify_digest(path, entry)
    read = checkpoint.read_checkpoint(path)
    _check_complete(path.name, read)
    return [name, digest, read.family, _network_of(read), str(len(read.state)), _digest_source(path, entry)]


def _check_complete(name: str, read: Checkpoint) -> None:
    """Every tensor of the network is there, in its shape, and nothing else but adapters; their fit is seen when they are attached."""
    from slmsam2_cli.model import adapters, convert

    base, _ = adapters.split(read.state)
    if read.required_base is not None or read.network is None:
        return
    if wrong := convert.shape_mismatch(convert.expected_shapes(read.network), base):
        raise WeightsError(f"{name}: is not a whole {read.network.size} network: {wrong}. Fetch, import or train it again")


def _network_of(read: Checkpoint) -> str:
    assert read.network is not None
    kind = f"an adapter for {read.required_base.name}, " if read.required_base else ""
    return f"{kind}{read.network.size}, policy {read.network.policy}"


def _digest_source(path: Path, entry: Entry | None) -> str:
    if path.suffix == ".safetensors":
        return "the digest inside"
    if entry is None:
        return "nothing: not published"
    return "the published one" if entry.sha256 else "the one at download" if zoo.recorded_digest(path) else "nothing: none was published"


def _sha256(path: Path) -> str:
    if path.is_dir():
        raise WeightsError(f"{path}: a directory, not a file. Name a file of weights")
    try:
        return sha256_of(path)
    except InputError as error:
        raise WeightsError(f"{path}: {error.what}. Name a file of weights") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error_reason(error)}") from None


def import_weights(file: Path, *, name: str | None = None, overwrite: bool = False) -> int:
    """Convert weights made elsewhere into this user's cache. The exit code: 0.

    WeightsError when they are of no known family or not whole, UsageError for a name that cannot be, OutputError, LockError.
    """
    from slmsam2_cli.model import checkpoint

    digest = _sha256(file)
    entry = zoo.find_by_digest(digest)
    name = _name_for(file, name, entry)
    path = zoo.folder() / f"{name}.safetensors"
    if path.exists() and not overwrite:
        raise UsageError(f"{path}: weights of that name are here already. Choose another --name, or add --overwrite")
    read = checkpoint.read_checkpoint(file)
    assert read.network is not None
    _check_complete(file.name, read)
    made = checkpoint.Provenance(
        pretrained=entry.name if entry else file.name, pretrained_digest=digest, licence=entry.licence if entry else ""
    )
    state = _finite_state(file.name, read)
    with atomic.lock_folder(zoo.folder(), name):
        header = checkpoint.Header(read.network, read.provenance or made, read.plan, read.calibration, read.required_base)
        checkpoint.save_weights(path, state, header)
    for note in read.notes:
        console.say(note)
    console.say(f"{name}: {read.family}, {_network_of(read)}, {len(state)} tensors, {path}")
    if not (read.provenance or made).licence:
        console.say("what these weights may be used for is not known here: ask whoever made them")
    console.say(f"use it with --weights {name} (slmsam2 plan --network {read.network.size})")
    return DONE


def _finite_state(name: str, read: Checkpoint) -> dict[str, Tensor]:
    """The tensors as 32-bit numbers that share no memory. WeightsError when some are not finite."""
    state = {key: tensor.float().clone().contiguous() for key, tensor in read.state.items()}
    if broken := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
        raise WeightsError(f"{name}: holds numbers that are not finite, in {', '.join(broken[:3])}. Its training failed; refused")
    return state


def _name_for(file: Path, name: str | None, entry: Entry | None) -> str:
    """What imported weights are called; a published name is for the published file alone."""
    chosen = name if name is not None else entry.name if entry else re.sub(r"[^A-Za-z0-9._+-]+", "-", file.stem).strip("-._+")[:100]
    if not zoo.NAME.fullmatch(chosen) or chosen in zoo.RESERVED:
        raise UsageError(f"--name {chosen}: not a name for weights. Use letters, digits, dots, dashes; not {', '.join(zoo.RESERVED)}")
    meant = zoo.find(chosen)
    if meant is not None and meant.sha256 is not None and meant != entry:
        raise UsageError(f"{chosen} is the name of published weights, and {file.name} is another file. Choose another --name")
    return chosen
