"""Weights known by name: where they are published, and where they are stored on this computer. Nothing is downloaded here.

Every digest comes from a published source, which `source` names. Where no digest is published it is None, and `slmsam2 weights get`
says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from slmsam2_cli.errors import WeightsError
from slmsam2_cli.io.files import InputError, error_reason, sha256_of
from slmsam2_cli.planning.plan import NetworkSize

BUNDLED_WEIGHTS = Path(__file__).parents[1] / "assets" / "nano.safetensors"
BUNDLED_NAME = "nano"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
RESERVED = ("auto", "random", BUNDLED_NAME)
_META = "https://dl.fbaipublicfiles.com/segment_anything_2/"
_WANGLAB = "https://huggingface.co/wanglab/MedSAM2/resolve/e4a6f35edd7e091619cbc0750f462f1574e23955/"
_MIRROR_2_1 = "huggingface.co/camenduru/sam2-1-hiera, commit cdd35a4"
_MEDSAM2_TERMS = "CC-BY-SA-4.0"
_MEDSAM2_NOTE = "512 px; its model card allows research and education only"


@dataclass(frozen=True)
class Entry:
    """Published weights. bytes, sha256: of the file at `url`; None where not published. source: where they are published."""

    name: str
    size: NetworkSize
    family: str
    url: str
    bytes: int | None
    sha256: str | None
    source: str
    licence: str = "Apache-2.0"
    note: str = ""

    @property
    def file(self) -> str:
        """Return the file name at the end of `url`."""
        return self.url.rpartition("/")[2]


def _sam2(version: str, size: NetworkSize, count: int, sha256: str, source: str) -> Entry:
    """Describe weights that Meta published; count: bytes of the file."""
    file = f"072824/sam2_hiera_{size}.pt" if version == "2.0" else f"092824/sam2.1_hiera_{size}.pt"
    return Entry(f"sam{version}-{size.replace('_', '-')}", size, f"SAM {version}", _META + file, count, sha256, source)


def _medsam2(name: str, file: str, count: int | None = None, sha256: str | None = None, source: str = "") -> Entry:
    """Describe weights of MedSAM2 (Ma et al., arXiv:2504.03600), which have the architecture of SAM 2.1 tiny; count: bytes of the file."""
    return Entry(name, "tiny", "SAM 2.1", _WANGLAB + file, count, sha256, source, _MEDSAM2_TERMS, _MEDSAM2_NOTE)


ENTRIES = (
    _sam2(
        "2.1",
        "tiny",
        156_008_466,
        "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
        f"huggingface.co/facebook/sam2.1-hiera-tiny, commit 36f406a; {_MIRROR_2_1}",
    ),
    _sam2(
        "2.1",
        "small",
        184_416_285,
        "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
        f"huggingface.co/facebook/sam2.1-hiera-small, commit 6c381d9; {_MIRROR_2_1}",
    ),
    _sam2(
        "2.1",
        "base_plus",
        323_606_802,
        "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
        f"{_MIRROR_2_1}; many public projects that pin it",
    ),
    _sam2(
        "2.1",
        "large",
        898_083_611,
        "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
        f"{_MIRROR_2_1}; many public projects that pin it",
    ),
    _sam2(
        "2.0",
        "tiny",
        155_906_050,
        "65b50056e05bcb13694174f51bb6da89c894b57b75ccdf0ba6352c597c5d1125",
        "huggingface.co/facebook/sam2-hiera-tiny, commit a8e4b46",
    ),
    _sam2(
        "2.0",
        "small",
        184_309_650,
        "95949964d4e548409021d47b22712d5f1abf2564cc0c3c765ba599a24ac7dce3",
        "huggingface.co/facebook/sam2-hiera-small, commit 4868896; size: public projects that pin it",
    ),
    _sam2(
        "2.0",
        "base_plus",
        323_493_298,
        "d0bb7f236400a49669ffdd1be617959a8b1d1065081789d7bbff88eded3a8071",
        "huggingface.co/facebook/sam2-hiera-base-plus, commit b470a6f; size: merve/sam2-hiera-base-plus, commit 838f027",
    ),
    _sam2(
        "2.0",
        "large",
        897_952_466,
        "7442e4e9b732a508f80e141e7c2913437a3610ee0c77381a66658c3a445df87b",
        "huggingface.co/merve/sam2-hiera-large, commit 9551b5a; size: public projects that pin it",
    ),
    _medsam2(
        "medsam2",
        "MedSAM2_latest.pt",
        156_040_129,
        "c92743b99f00d078bf32a3afcc38aaa9faf1c1692dffe3eaa7a90938c1991060",
        "six public projects that pin this file agree; the file's own page was not seen",
    ),
    _medsam2("medsam2-ct-lesion", "MedSAM2_CTLesion.pt"),
    _medsam2("medsam2-mri-liver-lesion", "MedSAM2_MRI_LiverLesion.pt"),
    _medsam2("medsam2-us-heart", "MedSAM2_US_Heart.pt"),
)


def folder() -> Path:
    """Return the user's folder of weights, shared by all datasets: below XDG_CACHE_HOME if set, else the system's folder of caches."""
    return platformdirs.user_cache_path("slmsam2", appauthor=False) / "weights"


def find(name: str) -> Entry | None:
    """Find published weights by name."""
    return next((entry for entry in ENTRIES if entry.name == name), None)


def find_by_digest(sha256: str) -> Entry | None:
    """Find published weights by the digest of their file."""
    return next((entry for entry in ENTRIES if entry.sha256 == sha256), None)


def installed_path(name: str) -> Path | None:
    """Find the file of bundled, downloaded or imported weights; None if they are not on this computer."""
    if name == BUNDLED_NAME:
        return BUNDLED_WEIGHTS if BUNDLED_WEIGHTS.is_file() else None
    entry = find(name)
    paths = [*([folder() / entry.file] if entry else []), folder() / f"{name}.safetensors"]
    return next((path for path in paths if path.is_file()), None)


def is_name(text: str) -> bool:
    """Tell a name of weights from a path."""
    return find(text) is not None or bool(NAME.fullmatch(text) and installed_path(text))


def imported() -> list[str]:
    """List the names of imported weights; published weights that were imported are among them."""
    return sorted(path.stem for path in folder().glob("*.safetensors") if NAME.fullmatch(path.stem))


def locate(name: str) -> Path:
    """Find the file that a name or a path means, and verify the digest of downloaded weights.

    Raises: WeightsError when published weights are not on this computer, when their file has changed, or when the name is unknown.
    """
    entry = find(name)
    path = installed_path(name) if NAME.fullmatch(name) else None
    if path is not None:
        verify_digest(path, entry)
        return path
    if entry is not None:
        raise WeightsError(f"{name}: not on this computer. Run slmsam2 weights get {name} (or slmsam2 weights import FILE)")
    path = Path(name)
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        raise WeightsError(f"{name}: no such file, and no weights of that name. Run slmsam2 weights list for the names")
    return path


def recorded_digest(path: Path) -> str | None:
    """Read the digest that a file had when it was downloaded, from FILE.sha256 (in the format of sha256sum)."""
    try:
        words = path.with_name(path.name + ".sha256").read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return None
    return words[0] if words and re.fullmatch(r"[0-9a-f]{64}", words[0]) else None


def verify_digest(path: Path, entry: Entry | None) -> str | None:
    """Compare a downloaded file with the published digest, or with the digest at download; imported files contain their own.

    Returns the digest; None if there is none to compare with.

    Raises: WeightsError when the file cannot be read or has changed.
    """
    wanted = (entry.sha256 if entry else None) or recorded_digest(path)
    if wanted is None or entry is None or path.suffix == ".safetensors":
        return None
    try:
        found = sha256_of(path)
    except (InputError, OSError) as error:
        raise WeightsError(f"{path.name}: cannot be read: {error_reason(error) if isinstance(error, OSError) else error.what}") from None
    if found != wanted:
        raise WeightsError(
            f"{path.name}: corrupt or changed: its SHA-256 is {found[:12]}…, that of {entry.name} is {wanted[:12]}…. "
            f"Delete it and run slmsam2 weights get {entry.name}"
        )
    return found
