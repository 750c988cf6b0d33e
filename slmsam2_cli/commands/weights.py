"""Download, list, verify and import weights.   Reads the network (get alone), files.   Writes the user's cache, zoo.folder().

The cache holds downloaded files as they were published, with NAME.sha256 next to those for which no digest was published, and imported
weights as NAME.safetensors.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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

if TYPE_CHECKING:  # torch is loaded by the two commands that read tensors
    from slmsam2_cli.model.checkpoint import Checkpoint

_LIST_COLUMNS = ["name", "MB", "network", "licence", "here", "verified", "note"]
_VERIFY_COLUMNS = ["name", "SHA-256", "layout", "network", "tensors", "digest compared with"]


def list_weights() -> int:
    """Print a table of the published weights and of those in the cache. Returns the exit code 0."""
    rows = []
    if zoo.installed_path(zoo.BUNDLED_NAME):
        size = f"{zoo.BUNDLED_WEIGHTS.stat().st_size / 1e6:.1f}"
        rows.append([zoo.BUNDLED_NAME, size, "nano", "Apache-2.0", "yes", "when read", "comes with slmsam2; --weights auto"])
    for entry in zoo.ENTRIES:
        path = zoo.installed_path(entry.name)
        if path is None:
            verified = "-"
        elif path.suffix == ".safetensors":
            verified = "when imported"
        else:
            verified = "when downloaded" if entry.sha256 is not None else "no published hash"
        size = f"{entry.bytes / 1e6:.1f}" if entry.bytes else "?"
        rows.append([entry.name, size, entry.size, entry.licence, "yes" if path else "no", verified, entry.note or entry.family])
    rows += [_imported_row(name) for name in zoo.imported() if zoo.find(name) is None]
    console.table("weights", _LIST_COLUMNS, rows)
    console.say(f"kept in {zoo.folder()}")
    return DONE


def _imported_row(name: str) -> list[str]:
    """Make the row of imported weights from the header of their file; what cannot be read is unknown."""
    path = zoo.folder() / f"{name}.safetensors"
    network: dict[str, object] = {}
    provenance: dict[str, object] = {}
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
        values = [parse(header.get(key, "{}").encode()) for key in ("network", "provenance")]
        network, provenance = (value if isinstance(value, dict) else {} for value in values)
    except (SafetensorError, OSError, ValueError, struct.error, JsonRejected):
        pass
    size, licence = str(network.get("size", "?")), str(provenance.get("licence") or "unknown")
    note = f"imported from {provenance.get('pretrained') or 'a file'}"
    return [name, f"{path.stat().st_size / 1e6:.1f}", size, licence, "yes", "when imported", note]


def get(name: str, *, output: Path | None = None, sha256: str | None = None, url: str | None = None) -> int:
    """Download published weights into the user's cache, or into a folder. Returns the exit code 0.

    sha256: the digest that the file must have; url: download from there instead.

    Raises: UsageError for an unknown name or an invalid digest; DownloadError, DigestError, OutputError or LockError when the file cannot
    be downloaded, differs from the expected one, or cannot be written.
    """
    entry = zoo.find(name)
    if entry is None:
        names = ", ".join(entry.name for entry in zoo.ENTRIES)
        raise UsageError(f"{name}: no published weights of that name. Known are {names}")
    folder = output if output is not None else zoo.folder()
    wanted = DownloadTarget(url or entry.url, folder / entry.file, entry.bytes, _expected_digest(entry, sha256))
    with atomic.lock_folder(folder, entry.name):
        known = wanted.sha256 or zoo.recorded_digest(wanted.path)
        if known is None or not wanted.path.is_file():
            _download(wanted, entry)
        elif sha256_of(wanted.path) == known:
            console.say(f"{name} is here already and unchanged: {wanted.path}")
        else:
            console.warn(f"{wanted.path} differs from the published {entry.name}; downloading it again")
            _download(wanted, entry)
    console.say(f"licence: {entry.licence}" + (f" ({entry.note})" if entry.note else ""))
    weights = name if output is None else wanted.path
    console.say(f"use it with --weights {weights} (network {entry.size}: slmsam2 plan --network {entry.size})")
    return DONE


def _expected_digest(entry: Entry, sha256: str | None) -> str | None:
    """Return the SHA-256 that the file must have: the published one, the one given by the user, or None.

    Raises: UsageError when the given one is no SHA-256, or differs from the published one.
    """
    if sha256 is None:
        return entry.sha256
    given = sha256.strip().lower().removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-f]{64}", given):
        raise UsageError(f"--sha256 {sha256}: not a SHA-256, which has 64 digits from 0 to f")
    if entry.sha256 is not None and given != entry.sha256:
        raise UsageError(f"--sha256 {given[:12]}… is not the digest published for {entry.name}, {entry.sha256[:12]}…. Leave it out")
    return given


def _download(wanted: DownloadTarget, entry: Entry) -> None:
    """Download a file, check its digest, and record the digest where none was published.

    Raises: DownloadError, with the way to do it by hand, or DigestError or OutputError, when that fails.
    """
    console.say(f"downloading {wanted.url}")
    try:
        with _progress_bar(entry.name) as report:
            digest = fetch(wanted, report, console.say)
    except DownloadError as error:
        kept = "The part that has arrived is kept: run the same command again" if wanted.partial.exists() else "Run the same command later"
        raise DownloadError(
            f"{error}. {kept}. Or download {wanted.url} on any computer, and run slmsam2 weights import FILE --name {entry.name}"
        ) from None
    console.say(f"{entry.name}: {wanted.path} ({wanted.path.stat().st_size / 1e6:.1f} MB)")
    if entry.sha256 is not None:
        console.say(f"its SHA-256 is the published one: {digest}")
        return
    atomic.write_text(wanted.path.with_name(wanted.path.name + ".sha256"), f"{digest}  {wanted.path.name}\n")
    if wanted.sha256 is None:
        console.warn(f"no published hash is known for this file; its digest after download is {digest}; pin it with --sha256")


@contextmanager
def _progress_bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Provide a function that takes (bytes so far, bytes in all or None) and shows a bar in MB once the length is known."""
    advance: console.Advance | None = None
    shown = 0
    with ExitStack() as stack:

        def report(have: int, total: int | None) -> None:
            nonlocal advance, shown
            if advance is None:
                if total is None:
                    return
                advance = stack.enter_context(console.progress(f"{name}, MB", -(-total // 1_000_000)))
            now = -(-have // 1_000_000)
            if now != shown:
                advance(now - shown)
                shown = now

        yield report


def verify(target: str | None) -> int:
    """Check digest and tensors of one file of weights, or of all in the cache. Returns the exit code: 1 when one of all is invalid.

    Raises: WeightsError when `target` is missing or invalid.
    """
    if target is not None:
        path = zoo.installed_path(target) if zoo.NAME.fullmatch(target) else None
        found = {target: path if path is not None else zoo.locate(target)}
    else:
        names = (zoo.BUNDLED_NAME, *(entry.name for entry in zoo.ENTRIES), *zoo.imported())
        found = {name: path for name in names if (path := zoo.installed_path(name)) is not None}
    if not found:
        console.say(f"no weights in {zoo.folder()}. Run slmsam2 weights list to see which can be downloaded")
        return DONE
    rows, failed = [], False
    for name, path in found.items():
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


def _verified_row(name: str, path: Path) -> list[str]:
    """Check digest, layout and tensors of one file, and make its row.

    Raises: WeightsError when one of them is wrong.
    """
    from slmsam2_cli.model import checkpoint

    digest = _sha256(path)
    entry = zoo.find(name) or zoo.find_by_digest(digest)
    zoo.verify_digest(path, entry)
    read = checkpoint.read_checkpoint(path)
    _check_complete(path.name, read)
    if path.suffix == ".safetensors":
        source = "the digest inside"
    elif entry is None:
        source = "nothing: not published"
    elif entry.sha256:
        source = "the published one"
    else:
        source = "the one at download" if zoo.recorded_digest(path) else "nothing: none was published"
    return [name, digest, read.family, _describe_network(read), str(len(read.state)), source]


def _check_complete(name: str, read: Checkpoint) -> None:
    """Check that every tensor of the network is there, in its shape, and nothing else but adapters, which are checked when attached.

    Raises: WeightsError when that is not so.
    """
    from slmsam2_cli.model import adapters, convert

    base, _ = adapters.split(read.state)
    if read.required_base is not None or read.network is None:
        return
    if wrong := convert.shape_mismatch(convert.expected_shapes(read.network), base):
        raise WeightsError(f"{name}: not a complete {read.network.size} network: {wrong}. Download, import or train it again")


def _describe_network(read: Checkpoint) -> str:
    """Describe size and memory policy, and the weights that an adapter needs."""
    assert read.network is not None
    kind = f"an adapter for {read.required_base.name}, " if read.required_base else ""
    return f"{kind}{read.network.size}, policy {read.network.policy}"


def _sha256(path: Path) -> str:
    """Compute the SHA-256 of a file.

    Raises: WeightsError when it is not a file or cannot be read.
    """
    if path.is_dir():
        raise WeightsError(f"{path}: a directory, not a file. Name a file of weights")
    try:
        return sha256_of(path)
    except InputError as error:
        raise WeightsError(f"{path}: {error.what}. Name a file of weights") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error_reason(error)}") from None


def import_weights(file: Path, *, name: str | None = None, overwrite: bool = False) -> int:
    """Convert weights from elsewhere into the user's cache. Returns the exit code 0.

    name: of the weights in the cache, None for the published name or the name of the file.

    Raises: WeightsError when the weights are of an unknown layout, incomplete or not finite; UsageError when the name is invalid or taken;
    OutputError or LockError when they cannot be written.
    """
    from slmsam2_cli.model import checkpoint

    digest = _sha256(file)
    entry = zoo.find_by_digest(digest)
    name = _choose_name(file, name, entry)
    path = zoo.folder() / f"{name}.safetensors"
    if path.exists() and not overwrite:
        raise UsageError(f"{path}: weights of that name are here already. Choose another --name, or add --overwrite")
    read = checkpoint.read_checkpoint(file)
    assert read.network is not None
    _check_complete(file.name, read)
    state = {key: tensor.float().clone().contiguous() for key, tensor in read.state.items()}  # float32 that share no memory
    if broken := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
        raise WeightsError(
            f"{file.name}: holds values that are not finite, in {', '.join(broken[:3])}. Its training failed; train it again"
        )
    provenance = read.provenance or checkpoint.Provenance(
        pretrained=entry.name if entry else file.name, pretrained_digest=digest, licence=entry.licence if entry else ""
    )
    with atomic.lock_folder(zoo.folder(), name):
        header = checkpoint.Header(read.network, provenance, read.plan, read.calibration, read.required_base)
        checkpoint.save_weights(path, state, header)
    for note in read.notes:
        console.say(note)
    console.say(f"{name}: {read.family}, {_describe_network(read)}, {len(state)} tensors, {path}")
    if not provenance.licence:
        console.say("the licence of these weights is not known: ask their authors what they may be used for")
    console.say(f"use it with --weights {name} (slmsam2 plan --network {read.network.size})")
    return DONE


def _choose_name(file: Path, name: str | None, entry: Entry | None) -> str:
    """Choose the name of imported weights: the requested one, else the published one, else one made from the file name.

    Raises: UsageError when it is invalid, or the published name of another file.
    """
    chosen = name if name is not None else entry.name if entry else re.sub(r"[^A-Za-z0-9._+-]+", "-", file.stem).strip("-._+")[:100]
    if not zoo.NAME.fullmatch(chosen) or chosen in zoo.RESERVED:
        raise UsageError(f"--name {chosen}: not a name for weights. Use letters, digits, dots, dashes; not {', '.join(zoo.RESERVED)}")
    published = zoo.find(chosen)
    if published is not None and published.sha256 is not None and published != entry:
        raise UsageError(f"{chosen} is the name of published weights, and {file.name} is another file. Choose another --name")
    return chosen
