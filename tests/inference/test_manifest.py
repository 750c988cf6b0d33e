"""What a folder of masks remembers, and how runs that share it account for it."""

import json
import threading

from slmsam2_cli.inference.manifest import MANIFEST, Records, cache_key
from slmsam2_cli.io import atomic


def finished(records, case, content="mask"):
    atomic.write_text(records.masks / f"{case}.nii", content)
    records.begin(case)
    records.finish(case, "key", {"output": f"{case}.nii"})


def cases(folder):
    return list(json.loads((folder / MANIFEST).read_text())["cases"])


def test_the_manifest_names_the_masks_that_are_there_under_the_head(tmp_path):
    records = Records(tmp_path)
    for case in "ba":
        finished(records, case)
    finished(records, "gone")
    (tmp_path / "gone.nii").unlink()
    records.begin("half")
    records.write_manifest({"tool_version": "1"})
    assert cases(tmp_path) == ["a", "b"]
    assert json.loads((tmp_path / MANIFEST).read_text())["tool_version"] == "1"


def test_what_another_run_finishes_meanwhile_is_not_lost(tmp_path):
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


def test_a_mask_is_out_of_date_until_its_case_is_as_it_was(tmp_path):
    records = Records(tmp_path)
    finished(records, "a")
    assert records.mark_stale("a") == "a.nii"
    records.write_manifest({})
    assert cases(tmp_path) == []
    records.unmark_stale("a")
    records.write_manifest({})
    assert cases(tmp_path) == ["a"]


def test_a_mask_that_was_changed_is_nobody_s(tmp_path):
    records = Records(tmp_path)
    finished(records, "a")
    assert records.intact(records.read("a"))
    (tmp_path / "a.nii").write_text("another")
    assert not records.intact(records.read("a"))
    assert records.mark_stale("a") is None


def test_a_key_changes_with_the_settings_and_with_every_input(tmp_path):
    one, two = tmp_path / "one.nii", tmp_path / "two.nii"
    one.write_text("1")
    keys = [cache_key("s", [one, two]), cache_key("t", [one, two]), cache_key("s", [one])]
    two.write_text("2")
    assert len({*keys, cache_key("s", [one, two])}) == 4
