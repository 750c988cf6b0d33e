"""slmsam2 evaluate on small folders: what it writes, prints and returns."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from slmsam2_cli import console
from slmsam2_cli.commands.evaluate import Options, evaluate
from slmsam2_cli.commands.plan import plan
from slmsam2_cli.errors import SlmSam2Error, UsageError
from slmsam2_cli.evaluation.inputs import unique_names
from slmsam2_cli.workspace import Workspace

SHAPE = (8, 16, 16)


def column(first, last, value=1):
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[first : last + 1, 4:8, 4:8] = value
    return array


def save(path, array, spacing=(1.0, 1.0, 3.0)):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


WHOLE, HALF = column(1, 4), column(1, 2)  # Dice 2/3


@pytest.fixture
def folders(tmp_path):
    """Three labels; predictions that are correct for a, half of the label for b, missing for c."""
    for case in "abc":
        save(tmp_path / "labels" / f"{case}.nii.gz", WHOLE)
    save(tmp_path / "masks" / "a.nii.gz", WHOLE)
    save(tmp_path / "masks" / "b.nii.gz", HALF)
    return tmp_path


@pytest.fixture
def data(tmp_path):
    """A data set of four cases in nnU-Net's layout whose workspace holds predictions of a, b and c; t was used for training."""
    root = tmp_path / "data"
    for case in "abct":
        save(root / "imagesTr" / f"{case}_0000.nii.gz", np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE))
        save(root / "labelsTr" / f"{case}.nii.gz", WHOLE)
    content = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "PZ": 1}, "numTraining": 4, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(content))
    space = Workspace.of(root, None)
    for case, mask in (("a", WHOLE), ("b", HALF), ("c", WHOLE)):
        save(space.predictions / f"{case}.nii.gz", mask)
    space.split.parent.mkdir()
    space.split.write_text(json.dumps({"training": ["t"]}))
    return root


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def run(folder, **options):
    arguments = {
        "predictions": (folder / "masks",),
        "labels": folder / "labels",
        "workspace": None,
        "output": folder / "out",
        "dataset": None,
    }
    return evaluate(**(arguments | options))


def by_case(found):
    return {case["case"]: case for case in found["metric_per_case"]}


def test_two_folders_are_compared_and_a_missing_prediction_is_exit_one(folders, capsys):
    assert run(folders) == 1
    found = summary(folders / "out")
    assert {name: case["metrics"]["1"]["Dice"] for name, case in by_case(found).items()} == pytest.approx({"a": 1, "b": 2 / 3, "c": 0})
    assert found["mean"]["1"]["Dice"] == pytest.approx(5 / 9)
    assert "error: case c: no prediction" in capsys.readouterr().err


def test_complete_predictions_are_exit_zero(folders):
    save(folders / "masks" / "c.nii.gz", WHOLE)
    assert run(folders) == 0


def test_the_table_and_the_written_files_are_printed(folders, capsys):
    run(folders)
    shown = capsys.readouterr()
    assert "held-out cases: 3. HD95: larger of the two directed 95th percentiles" in shown.out
    assert "0.556" in shown.out
    assert all(str(folders / "out" / name) in shown.err for name in ("summary.json", "cases.csv", "slices.csv", "summary.md"))


def test_json_prints_the_summary_and_nothing_else(folders, capsys):
    run(folders, as_json=True)
    assert json.loads(capsys.readouterr().out) == summary(folders / "out")


def test_without_an_output_folder_results_go_to_a_subfolder_of_the_masks(folders):
    (folders / "masks" / "report.html").write_text("predict's")
    run(folders, output=None)
    assert summary(folders / "masks" / "evaluation")["cases"]["pred_missing"] == ["c"]
    assert (folders / "masks" / "report.html").read_text() == "predict's"


def test_running_twice_gives_the_same_bytes(folders):
    run(folders)
    first = {path.name: path.read_bytes() for path in (folders / "out").glob("[a-z]*")}
    run(folders)
    assert {path.name: path.read_bytes() for path in (folders / "out").glob("[a-z]*")} == first


def test_a_summary_of_another_tool_is_not_overwritten(folders):
    (folders / "out").mkdir()
    (folders / "out" / "summary.json").write_text('{"mean": {}}')
    with pytest.raises(UsageError, match="not written by slmsam2"):
        run(folders)
    assert (folders / "out" / "summary.json").read_text() == '{"mean": {}}'


def test_the_labels_folder_is_never_written_to(folders):
    (folders / "link").symlink_to(folders / "labels")
    for out in (folders / "labels", folders / "link"):
        with pytest.raises(UsageError, match="holds the labels"):
            run(folders, output=out)


def test_an_invalid_case_is_failed_and_listed_first_and_the_others_are_scored(folders, capsys):
    save(folders / "masks" / "c.nii.gz", WHOLE, spacing=(1.0, 1.0, 4.0))
    assert run(folders) == 1
    found = summary(folders / "out")
    assert [case["case"] for case in found["metric_per_case"]] == ["c", "a", "b"]
    assert found["mean"]["1"]["Dice"] == pytest.approx(5 / 6)
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: case c: c.nii.gz:"))
    assert "spacing (3, 1, 1) but (4, 1, 1)" in error


def test_only_failed_cases_are_exit_two(folders):
    for case in "abc":
        (folders / "masks" / f"{case}.nii.gz").write_bytes(b"no mask")
    assert run(folders) == 2


def test_folders_without_a_common_name_are_rejected(folders):
    for case, other in zip("ab", "xy"):
        (folders / "masks" / f"{case}.nii.gz").rename(folders / "masks" / f"{other}.nii.gz")
    with pytest.raises(UsageError, match="found x, y; expected a, b, c"):
        run(folders)
    assert not (folders / "out").exists()


def test_a_missing_folder_is_named(folders):
    nowhere = folders / "nowhere"
    for option in ("predictions", "labels"):
        with pytest.raises(UsageError, match="nowhere"):
            run(folders, **{option: nowhere if option == "labels" else (nowhere,)})


def test_without_labels_the_error_names_the_option(folders):
    with pytest.raises(UsageError, match="-g"):
        run(folders, labels=None)


def test_a_prediction_without_label_is_a_warning(folders, capsys):
    save(folders / "masks" / "x.nii.gz", WHOLE)
    run(folders)
    assert summary(folders / "out")["cases"]["without_reference"] == ["x"]
    assert "1 predictions have no label" in capsys.readouterr().err


def test_the_manifest_provides_axis_annotated_slices_training_cases_and_model(folders):
    entry = {"array_axis": 0, "annotated_slices": {"1": [2]}, "training": False}
    cases = {"a": entry | {"training": True}, "b": entry}
    (folders / "masks" / "manifest.json").write_text(json.dumps({"format_version": 2, "model": {"digest": "ab"}, "cases": cases}))
    run(folders)
    found = summary(folders / "out")
    assert by_case(found)["b"]["unprompted"]["1"]["Dice"] == pytest.approx(2 * 1 / (3 + 1))
    assert (by_case(found)["a"]["group"], found["model"]) == ("training", {"digest": "ab"})
    assert found["mean"]["1"]["Dice"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["unprompted"]["mean"]["1"]["Dice"] == pytest.approx((1 / 2 + 0) / 2)


def test_without_manifest_unprompted_values_are_null(folders):
    run(folders)
    assert by_case(summary(folders / "out"))["a"]["unprompted"]["1"]["Dice"] is None


def test_the_workspace_s_predictions_are_compared_with_the_data_set_s_labels(data):
    space = Workspace.of(data, None)
    assert evaluate((), None, space, None, dataset=data) == 0
    found = summary(space.evaluation)
    assert (found["labels"], found["cases"]["held_out"], found["cases"]["training_not_predicted"]) == ({"1": "PZ"}, 3, ["t"])
    assert found["metric_per_case"][0]["reference_file"] == "labelsTr/a.nii.gz"
    assert found["foreground_mean"]["Dice"] == pytest.approx(8 / 9)


def test_training_cases_are_reported_separately(data):
    space = Workspace.of(data, None)
    save(space.predictions / "t.nii.gz", column(1, 1))
    evaluate((), None, space, None, dataset=data)
    found = summary(space.evaluation)
    assert (found["foreground_mean"]["Dice"], found["training"]["foreground_mean"]["Dice"]) == pytest.approx((8 / 9, 2 / 5))


@pytest.mark.parametrize("place", ["", "labelsTr"])
def test_a_data_set_or_its_labels_may_be_named_as_labels(data, place):
    masks = Workspace.of(data, None).predictions
    assert evaluate((masks,), data / place, None, data.parent / "out", dataset=None) == 0
    found = summary(data.parent / "out")
    assert (found["labels"], found["cases"]["training_not_predicted"]) == ({"1": "PZ"}, ["t"])


def test_a_label_that_occurs_nowhere_is_in_the_table_and_in_no_mean(data):
    content = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(content | {"labels": {"background": 0, "PZ": 1, "TZ": 2}}))
    space = Workspace.of(data, None)
    evaluate((), None, space, None, dataset=data)
    found = summary(space.evaluation)
    assert (found["mean"]["2"]["Dice"], found["status_counts"]["2"]) == (None, {"both_empty": 3})
    assert found["foreground_mean"]["Dice"] == pytest.approx(8 / 9)


def test_a_training_case_is_recognised_by_the_name_of_its_prediction_too(data):
    """Its label has another name, as in a folder of labels from elsewhere."""
    space, labels = Workspace.of(data, None), data.parent / "elsewhere"
    save(space.predictions / "t.nii.gz", WHOLE)
    for case in "abct":
        save(labels / f"{case}_gt.nii.gz", WHOLE)
    assert evaluate((), labels, space, data / "out", dataset=None, images=data / "imagesTr") == 0
    assert {name: case["group"] for name, case in by_case(summary(data / "out")).items()}["t_gt"] == "training"
    assert summary(data / "out")["cases"]["held_out"] == 3
    assert '"image":null' not in (data / "out" / "report.html").read_text(encoding="utf-8")  # images are found by the names of the masks


def test_an_invalid_split_is_rejected(data):
    space = Workspace.of(data, None)
    space.split.write_text("[]")
    with pytest.raises(SlmSam2Error, match=r"split\.json"):
        evaluate((), None, space, None, dataset=data)


@pytest.mark.parametrize(("threshold", "code"), [("Dice=0.8", 1), ("dice=0.8", 1), ("0.5", 0), ("IoU=0.9", 1), ("nsd=0.5", 0)])
def test_a_mean_below_the_threshold_is_exit_one(folders, threshold, code):
    shutil.copy(folders / "masks" / "b.nii.gz", folders / "masks" / "c.nii.gz")
    assert run(folders, fail_under=(threshold,)) == code


@pytest.mark.parametrize("threshold", ["HD95=3", "Dice=high", "1.5", ""])
def test_an_invalid_threshold_is_rejected(folders, threshold):
    with pytest.raises(UsageError, match="not a threshold"):
        run(folders, fail_under=(threshold,))


def test_no_absolute_path_is_written(folders):
    run(folders)
    written = [path.read_text() for path in (folders / "out").glob("[a-z]*")]
    assert len(written) == 5
    assert not any(str(folders) in text for text in written)


def test_quiet_runs_print_only_the_requested_json(folders, capsys, monkeypatch):
    save(folders / "masks" / "c.nii.gz", WHOLE)
    monkeypatch.setattr(console.settings, "quiet", True)
    with warnings.catch_warnings():
        run(folders, as_json=True)
    assert json.loads(capsys.readouterr().out)["cases"]["held_out"] == 3


@pytest.fixture
def two_predictions(folders):
    """Two folders of complete predictions: "good" equals the labels, "poor" is half of them."""
    for case in "abc":
        save(folders / "good" / f"{case}.nii.gz", WHOLE)
        save(folders / "poor" / f"{case}.nii.gz", HALF)
    return folders


def test_several_predictions_are_scored_and_compared_in_pairs(two_predictions, capsys):
    assert run(two_predictions, predictions=(two_predictions / "poor", two_predictions / "good")) == 0
    out = two_predictions / "out"
    assert (summary(out / "poor")["mean"]["1"]["Dice"], summary(out / "good")["mean"]["1"]["Dice"]) == (pytest.approx(2 / 3), 1.0)
    found = json.loads((out / "comparison.json").read_text())
    dice = next(pair for pair in found["pairs"] if (pair["metric"], pair["part"]) == ("Dice", "all"))
    assert (dice["first"], dice["second"], dice["second_better"]) == ("poor", "good", 3)
    assert (dice["difference"], dice["ci95"]) == (pytest.approx(1 / 3), pytest.approx([1 / 3, 1 / 3]))
    assert "poor → good" in capsys.readouterr().out
    assert (out / "comparison.csv").read_text().startswith("case,label,name,poor Dice,good Dice")
    assert "| poor → good |" in (out / "comparison.md").read_text()


def test_the_worst_of_several_predictions_decides_the_exit_code(two_predictions):
    (two_predictions / "poor" / "c.nii.gz").unlink()
    assert run(two_predictions, predictions=(two_predictions / "good", two_predictions / "poor")) == 1


def test_only_failed_cases_in_one_of_several_predictions_are_exit_one(two_predictions):
    for case in "abc":
        (two_predictions / "poor" / f"{case}.nii.gz").write_bytes(b"no mask")
    assert run(two_predictions, predictions=(two_predictions / "good", two_predictions / "poor")) == 1


def test_folders_of_the_same_name_are_named_by_their_parent_folders(two_predictions):
    for name in ("x", "y"):
        shutil.copytree(two_predictions / "good", two_predictions / name / "masks")
    assert run(two_predictions, predictions=(two_predictions / "x" / "masks", two_predictions / "y" / "masks")) == 0
    assert json.loads((two_predictions / "out" / "comparison.json").read_text())["predictions"] == ["x-masks", "y-masks"]


def test_names_of_predictions_are_one_path_component_and_unique(tmp_path):
    assert unique_names([Path("/masks"), Path("/data/masks")]) == ["masks", "data-masks"]
    assert unique_names([Path("/home/ann/masks"), Path("/home/bob/masks")]) == ["1-masks", "2-masks"]  # no name of a user
    assert unique_names([Path("/home/ann/x/masks"), Path("/home/ann/y/masks")]) == ["x-masks", "y-masks"]
    assert unique_names([Path("/u/Ours"), Path("/v/ours")]) == ["u-Ours", "v-ours"]
    alike = unique_names([Path("/a-b/c"), Path("/a/b-c"), Path("/z/c")])
    assert len(set(alike)) == 3 and not any("/" in name for name in alike)


def test_a_failed_threshold_names_the_prediction(two_predictions, capsys):
    assert run(two_predictions, predictions=(two_predictions / "good", two_predictions / "poor"), fail_under=("0.8",)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert errors == ["error: poor: mean Dice 0.6667 is below the threshold (--fail-under 0.8)"]


def test_a_folder_is_not_compared_with_itself(two_predictions):
    with pytest.raises(UsageError, match="the same folder twice"):
        run(two_predictions, predictions=(two_predictions / "good", two_predictions / "good"))


def test_several_predictions_need_an_output_folder(two_predictions):
    with pytest.raises(UsageError, match="-o"):
        run(two_predictions, predictions=(two_predictions / "good", two_predictions / "poor"), output=None)


def test_a_comparison_of_another_tool_is_not_overwritten(two_predictions):
    (two_predictions / "out").mkdir()
    (two_predictions / "out" / "comparison.csv").write_text("mine")
    with pytest.raises(UsageError, match="not written by slmsam2"):
        run(two_predictions, predictions=(two_predictions / "good", two_predictions / "poor"))


def test_with_resample_a_mask_on_another_grid_is_resampled_to_the_label_s(folders, capsys):
    save(folders / "masks" / "c.nii.gz", np.repeat(WHOLE, 2, axis=0), spacing=(1.0, 1.0, 1.5))
    assert run(folders) == 1
    assert "--resample" in capsys.readouterr().err
    assert run(folders, options=Options(resample=True)) == 0
    found = summary(folders / "out")
    assert (found["cases"]["resampled"], by_case(found)["c"]["metrics"]["1"]["Dice"]) == (["c"], 1.0)
    assert "case c: the prediction was resampled to the label's grid" in capsys.readouterr().err
    assert 'data-volumes="c"' in (folders / "out" / "report.html").read_text(encoding="utf-8")


def test_annotated_slices_of_another_grid_are_not_applied_to_the_label_s(folders, capsys):
    """The mask is stored in reverse order: its annotated slice 6 is the label's slice 1."""
    save(folders / "masks" / "c.nii.gz", WHOLE[::-1])
    image = sitk.ReadImage(str(folders / "masks" / "c.nii.gz"))
    image.SetDirection((1, 0, 0, 0, 1, 0, 0, 0, -1))
    image.SetOrigin((0, 0, 21))
    sitk.WriteImage(image, str(folders / "masks" / "c.nii.gz"))
    entry = {"array_axis": 0, "annotated_slices": {"1": [6]}}
    (folders / "masks" / "manifest.json").write_text(json.dumps({"format_version": 2, "cases": dict.fromkeys("abc", entry)}))
    assert run(folders, options=Options(resample=True)) == 0
    found = by_case(summary(folders / "out"))["c"]
    assert (found["metrics"]["1"]["Dice"], found["unprompted"]["1"]["Dice"]) == (1.0, None)
    assert "the annotated slices are not known on that grid" in capsys.readouterr().err


def test_regions_are_scored_as_unions_of_their_labels(data):
    content = json.loads((data / "dataset.json").read_text())
    labels = {"background": 0, "whole": [1, 2], "PZ": 1}
    (data / "dataset.json").write_text(json.dumps(content | {"labels": labels}))
    space = Workspace.of(data, None)
    both = WHOLE.copy()
    both[3:5] *= 2  # PZ on slices 1 and 2, label 2 on slices 3 and 4
    for case in "abc":
        save(data / "labelsTr" / f"{case}.nii.gz", both)
        save(space.predictions / f"{case}.nii.gz", HALF)
    evaluate((), None, space, None, dataset=data)
    found = summary(space.evaluation)
    assert found["labels"] == {"1": "PZ", "(1, 2)": "whole"}
    assert {key: mean["Dice"] for key, mean in found["mean"].items()} == {"1": 1.0, "(1, 2)": pytest.approx(2 / 3)}
    assert found["foreground_mean"]["Dice"] == pytest.approx(5 / 6)


def test_slices_annotated_for_a_label_count_for_its_regions(data):
    content = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(content | {"labels": {"background": 0, "whole": [1, 2]}}))
    space = Workspace.of(data, None)
    cases = {case: {"array_axis": 0, "annotated_slices": {"1": [1], "2": [2]}} for case in "abc"}
    (space.predictions / "manifest.json").write_text(json.dumps({"format_version": 2, "cases": cases}))
    evaluate((), None, space, None, dataset=data)
    rest = by_case(summary(space.evaluation))["b"]["unprompted"]["(1, 2)"]
    assert (rest["n_ref"], rest["n_pred"]) == (2 * 16, 0)


def test_the_tolerance_of_nsd_is_the_plan_s_unless_an_option_sets_it(data):
    space = Workspace.of(data, None)
    plan(data, space)
    text = json.loads(space.plan.read_text())
    text["evaluation"]["nsd_tolerance_mm"] = 4.5
    space.plan.write_text(json.dumps(text))
    evaluate((), None, space, None, dataset=data)
    assert "nsd@4.5" in summary(space.evaluation)["mean"]["1"]
    evaluate((), None, space, None, dataset=data, tolerance_mm=1.0)
    assert "nsd@1" in summary(space.evaluation)["mean"]["1"]


def test_exchanged_labels_are_scored_unchanged_with_a_hint(folders, capsys):
    labels = WHOLE.copy()
    labels[:, 10:14, 4:8] = 2 * (column(1, 4)[:, 4:8, 4:8] > 0)
    for case in "abc":
        save(folders / "labels" / f"{case}.nii.gz", labels)
        save(folders / "masks" / f"{case}.nii.gz", np.array([0, 2, 1], dtype=np.uint8)[labels])
    assert run(folders) == 0
    found = summary(folders / "out")
    assert (found["mean"]["1"]["Dice"], found["mean"]["2"]["Dice"]) == (0.0, 0.0)
    assert by_case(found)["a"]["hints"][0].startswith("labels 1 and 2 appear to be exchanged")
    assert "warning: case a: labels 1 and 2 appear to be exchanged" in capsys.readouterr().err


def test_a_mask_with_another_direction_is_rejected(folders, capsys):
    save(folders / "masks" / "c.nii.gz", WHOLE)
    image = sitk.ReadImage(str(folders / "masks" / "c.nii.gz"))
    image.SetDirection((1, 0, 0, 0, 1, 0, 0, 0, -1))
    sitk.WriteImage(image, str(folders / "masks" / "c.nii.gz"))
    assert run(folders) == 1
    assert by_case(summary(folders / "out"))["c"]["status"] == "failed"
    assert "direction" in capsys.readouterr().err


def test_a_mirrored_mask_on_the_same_grid_is_scored_with_a_hint(folders):
    save(folders / "labels" / "c.nii.gz", column(0, 2))
    save(folders / "masks" / "c.nii.gz", column(5, 7))
    assert run(folders) == 0
    found = by_case(summary(folders / "out"))["c"]
    assert (found["metrics"]["1"]["Dice"], found["hints"][0].partition(":")[0]) == (0.0, "the prediction appears to be mirrored along z")


def test_a_float_mask_must_hold_whole_numbers(folders, capsys):
    for case, factor in (("a", 1.0), ("b", 1.0), ("c", 0.5)):
        save(folders / "masks" / f"{case}.nii.gz", (WHOLE * factor).astype(np.float32))
    assert run(folders) == 1
    found = by_case(summary(folders / "out"))
    assert (found["a"]["metrics"]["1"]["Dice"], found["c"]["status"]) == (1.0, "failed")
    assert "0.5" in capsys.readouterr().err


def test_empty_masks_have_dice_zero_and_the_diagonal_as_penalised_distance(folders):
    for case in "abc":
        save(folders / "masks" / f"{case}.nii.gz", np.zeros(SHAPE, dtype=np.uint8))
    assert run(folders) == 0
    found = summary(folders / "out")
    diagonal = (24**2 + 16**2 + 16**2) ** 0.5
    statistics = found["statistics"]["1"]["HD95"]
    assert (found["status_counts"]["1"], found["mean"]["1"]["Dice"]) == ({"pred_empty": 3}, 0.0)
    assert (statistics["n"], statistics["mean"], statistics["mean_penalised"]) == (0, None, pytest.approx(diagonal))


def test_an_empty_folder_of_predictions_is_rejected(folders):
    for path in (folders / "masks").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="found no masks; expected a, b, c"):
        run(folders)


def test_a_mask_of_another_case_is_scored_like_any_other(folders):
    save(folders / "labels" / "c.nii.gz", column(6, 7))
    shutil.copy(folders / "masks" / "a.nii.gz", folders / "masks" / "c.nii.gz")
    assert run(folders) == 0
    assert by_case(summary(folders / "out"))["c"]["metrics"]["1"]["Dice"] == 0.0


def test_the_report_is_written_by_default_and_not_with_no_report(folders):
    run(folders, options=Options(report=False))
    assert not (folders / "out" / "report.html").exists()
    run(folders)
    assert (folders / "out" / "report.html").read_text().startswith("<!doctype html>\n<!-- slmsam2 report -->")


def test_the_report_is_the_same_whether_drawn_while_scoring_or_from_files(data):
    images, masks, labels = data / "imagesTr", Workspace.of(data, None).predictions, data / "labelsTr"
    save(masks / "c.nii.gz", np.concatenate([HALF, HALF]), (1.0, 1.0, 1.5))  # another grid
    for name, held in (("scoring", 2**28), ("some", 2500), ("files", 0)):
        wanted = Options(workers=2, resample=True, max_kept_bytes=held)
        evaluate([masks], labels, None, data / name, dataset=None, images=images, options=wanted)
    pages = [(data / name / "report.html").read_bytes() for name in ("scoring", "some", "files")]
    assert pages[0] == pages[1] == pages[2]
    assert pages[0].count(b"data:image/webp") >= 3


def test_a_report_of_another_tool_is_not_overwritten(folders):
    (folders / "out").mkdir()
    (folders / "out" / "report.html").write_text("<p>mine</p>")
    with pytest.raises(UsageError, match="not written by slmsam2"):
        run(folders)


@pytest.mark.parametrize("name", ["report.html", "summary.json"])
def test_a_folder_with_the_name_of_an_output_is_an_error(folders, name):
    (folders / "out" / name).mkdir(parents=True)
    with pytest.raises(UsageError, match=f"{name} was not written by slmsam2"):
        run(folders)


def test_a_report_of_an_earlier_run_is_a_warning(folders, capsys):
    run(folders)
    assert "earlier run" not in capsys.readouterr().err
    run(folders, options=Options(report=False))
    assert "report.html is of an earlier run" in capsys.readouterr().err


@pytest.mark.parametrize("tolerance", [float("inf"), float("nan"), 0.0])
def test_an_invalid_tolerance_is_rejected_before_anything_is_written(folders, tolerance):
    with pytest.raises(UsageError, match="not a distance"):
        run(folders, tolerance_mm=tolerance)
    assert not (folders / "out").exists()


def test_a_folder_with_the_name_of_a_mask_is_a_failed_case(folders, capsys):
    (folders / "masks" / "c.nii.gz").mkdir()
    assert run(folders) == 1
    assert by_case(summary(folders / "out"))["c"]["status"] == "failed"
    assert "director" in capsys.readouterr().err


def test_a_case_of_the_data_set_without_its_label_is_failed(data, capsys):
    masks = Workspace.of(data, None).predictions
    (data / "labelsTr" / "c.nii.gz").unlink()
    assert evaluate((masks,), data / "labelsTr", None, data.parent / "out", dataset=None) == 1
    assert by_case(summary(data.parent / "out"))["c"]["status"] == "failed"
    assert "case c: imagesTr/c_0000.nii.gz: no label" in capsys.readouterr().err


def test_an_empty_label_is_a_warning(folders, capsys):
    save(folders / "labels" / "b.nii.gz", WHOLE * 0)
    run(folders)
    assert "warning: case b: the label is empty: no foreground" in capsys.readouterr().err


def test_a_folder_of_prompts_is_rejected_with_the_command_that_predicts_from_it(folders):
    (folders / "masks" / "a.prompts.json").write_text('{"axis": "SI", "annotated_slices": [1]}')
    with pytest.raises(UsageError, match=r"a folder of prompts \(it holds a.prompts.json.*slmsam2 predict -p"):
        run(folders)


def test_predictions_with_a_manifest_are_scored_although_prompts_lie_beside_them(folders):
    (folders / "masks" / "a.prompts.json").write_text('{"axis": "SI", "annotated_slices": [1]}')
    (folders / "masks" / "manifest.json").write_text(json.dumps({"format_version": 2, "cases": {}}))
    assert run(folders) == 1
    assert summary(folders / "out")["cases"]["pred_missing"] == ["c"]


def test_a_manifest_of_format_version_1_is_rejected(folders):
    (folders / "masks" / "manifest.json").write_text(json.dumps({"format_version": 1, "cases": {}}))
    with pytest.raises(UsageError, match="format_version 1"):
        run(folders)
