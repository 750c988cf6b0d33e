"""Digests of the masks that untuned nano writes for every labelled case of every data set, each from one slice per label.

python benchmarks/mask_digests.py ../shared/data OUTPUT                prints one digest per data set
python benchmarks/mask_digests.py ../shared/data OUTPUT --masks DIR    compares with the masks of an earlier run, in DIR/SET/CASE

Use it to show that a change leaves every mask as it was, byte for byte (gzip's bytes are unpacked first).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import sys
from pathlib import Path

from slmsam2_cli.cli.exit_codes import run_for_exit_code
from slmsam2_cli.commands.predict import predict


def digest_of_masks(folder: Path) -> tuple[str, int]:
    """SHA-256 over the names and unpacked bytes of a folder's masks, and how many there are."""
    digest, masks = hashlib.sha256(), sorted(folder.glob("*.nii.gz"))
    for mask in masks:
        digest.update(mask.name.encode() + gzip.decompress(mask.read_bytes()))
    return digest.hexdigest()[:16], len(masks)


def main() -> int:
    """Predict every data set, print its digest, and compare it where masks of an earlier run are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--masks", type=Path)
    options = parser.parse_args()
    different = 0
    for dataset in sorted(path.parent for path in options.data.glob("*/dataset.json")):
        images, labels, masks = dataset / "imagesTr", dataset / "labelsTr", options.output / dataset.name
        code = run_for_exit_code(
            lambda i=images, m=masks, t=labels: predict(i, m, simulate_from=t, device="cpu", report=False)  # type: ignore[misc]
        )
        digest, count = digest_of_masks(masks)
        earlier = digest_of_masks(options.masks / dataset.name) if options.masks else None
        different += earlier is not None and earlier != (digest, count)
        words = "" if earlier is None else "  as before" if earlier == (digest, count) else f"  DIFFERENT: {earlier[0]}"
        print(f"{digest}  {count:>3} masks  exit code {code}  {dataset.name}{words}", flush=True)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
