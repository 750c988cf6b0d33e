"""What a folder of masks remembers, and how runs that share it account for it."""

import hashlib
import json
import threading

import numpy as np

from slmsam2_cli.dataset.dataset_json import Case, PromptFiles
from slmsam2_cli.inference.manifest import MANIFEST, Records, digest_inputs
from slmsam2_cli.io import atomic
from slmsam2_cli.io.volume import Grid, Source, Volume


def finished(records, case):
    grid = Grid((1, 2, 2), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), np.eye(3))
    records.save_mask(case, "key", np.ones((1, 2, 2), np.uint8), Volume(np.zeros((1, 1, 2, 2)), grid, Source(".nii", ".nii")), {})


def cases(folder):
    return list(json.loads((folder / MANIFEST).read_text())["cases"])


def test_the_manifest_lists_the_masks_that_exist_below_its_header(tmp_path):
    records = Records(tmp_path)
    for case in "ba":
        finished(records, case)
    finished(records, "gone")
    (tmp_path / "gone.nii").unlink()
    records.begin("half")
    records.write_manifest({"tool_version": "1"})
    assert cases(tmp_path) == ["a", "b"]
    assert json.loads((tmp_path / MANIFEST).read_text())["tool_version"] == "1"


def test_masks_that_another_run_finishes_meanwhile_are_in_the_manifest(tmp_path):
    """A manifest waits for the one that is being written, and reads the records only then."""
    records = Records(tmp_path)
    finished(records, "a")
    with atomic.wait_for_lock(tmp_path / ".slmsam2-manifest.lock"):
        second = threading.Thread(target=records.write_manifest, args=({},))
        second.start()
        second.join(0.2)
        assert not (tmp_path / MANIFEST).exists()
        finished(records, "b")
    second.join(5)
    assert cases(tmp_path) == ["a", "b"]


def test_a_stale_mask_is_up_to_date_again_when_its_inputs_are_restored(tmp_path):
    records = Records(tmp_path)
    finished(records, "a")
    assert records.mark_stale("a") == "a.nii"
    records.write_manifest({})
    assert cases(tmp_path) == []
    records.unmark_stale("a")
    records.write_manifest({})
    assert cases(tmp_path) == ["a"]


def test_a_mask_that_was_changed_is_not_intact(tmp_path):
    records = Records(tmp_path)
    finished(records, "a")
    assert records.intact(records.read("a"))
    (tmp_path / "a.nii").write_text("another")
    assert not records.intact(records.read("a"))
    assert records.mark_stale("a") is None


def test_a_key_changes_with_the_settings_and_with_every_input(tmp_path):
    one, two = tmp_path / "one.nii", tmp_path / "two.nii"
    both = Case("a", (one,), None, PromptFiles(two))
    one.write_text("1")
    keys = [key for key, _ in (digest_inputs("s", both), digest_inputs("t", both), digest_inputs("s", Case("a", (one,), None)))]
    two.write_text("2")
    assert len({*keys, digest_inputs("s", both)[0]}) == 4


def test_the_digest_of_every_image_file_is_known_but_not_that_of_the_prompts(tmp_path):
    one, two = tmp_path / "one.nii", tmp_path / "two.nii"
    both = Case("a", (one,), None, PromptFiles(two))
    one.write_text("1")
    two.write_text("2")
    assert digest_inputs("s", both)[1] == {hashlib.sha256(b"1").hexdigest()}


def test_a_record_of_an_older_format_is_ignored(tmp_path):
    records = Records(tmp_path)
    finished(records, "a")
    (file,) = (tmp_path / ".slmsam2").iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 1}))
    assert records.read("a") == {}
    records.write_manifest({})
    assert cases(tmp_path) == []
