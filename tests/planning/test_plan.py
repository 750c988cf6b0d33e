"""A plan can be read, edited and compared, and refuses what it does not know."""

from __future__ import annotations

import json

import pytest

from slmsam2_cli.errors import PlanError
from slmsam2_cli.planning.plan import (
    ChannelIntensity,
    EvaluationPlan,
    GeometryPlan,
    InferencePlan,
    NetworkPlan,
    Plan,
    TrainingPlan,
    differences,
    keep_edits,
    read_plan,
    with_digest,
    write_plan,
)


def plan(**changes):
    geometry = GeometryPlan(slice_axis="SI", in_plane_mm=0.5, through_plane_mm=None, input_size=128, crop_to_nonzero=True)
    training = TrainingPlan(steps=100, clips_per_step=4, learning_rate=1e-4, warmup_steps=10, weight_decay=0.1)
    return with_digest(
        Plan(
            tool_version="1",
            dataset_name="d",
            modality="MR",
            channels=("MRI",),
            labels={1: "a", 2: "b"},
            geometry=geometry,
            intensity=(ChannelIntensity(name="MRI", scheme="percentile", lower=0.5, upper=99.5),),
            network=NetworkPlan(size="nano"),
            training=training,
            reasons={"modality": "by its name"},
            fingerprint_digest="f",
        ).model_copy(update=changes)
    )


def edited(tmp_path, change):
    """The plan after somebody changed the file."""
    path = tmp_path / "plan.json"
    write_plan(path, plan())
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return path


def test_a_plan_comes_back_as_it_was_written(tmp_path):
    write_plan(tmp_path / "plan.json", plan())
    assert read_plan(tmp_path / "plan.json") == plan()


def test_labels_are_keyed_by_number(tmp_path):
    write_plan(tmp_path / "plan.json", plan())
    assert read_plan(tmp_path / "plan.json").labels == {1: "a", 2: "b"}


def test_reasons_and_versions_do_not_change_the_digest():
    assert plan(reasons={"modality": "another"}).digest == plan(tool_version="2").digest == plan().digest
    assert plan(modality="CT").digest != plan().digest


def test_an_edit_shows(tmp_path):
    path = edited(tmp_path, lambda value: value["geometry"].update(input_size=256))
    assert not plan().edited
    assert read_plan(path).edited


def test_a_rewritten_reason_is_no_edit(tmp_path):
    assert not read_plan(edited(tmp_path, lambda value: value["reasons"].update(modality="I say so"))).edited


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v["geometry"].update(frame_pix=256), r"geometry\.frame_pix: unknown key"),
        (lambda v: v.update(epochs=3), r"epochs: unknown key"),
        (lambda v: v["geometry"].pop("slice_axis"), r"geometry\.slice_axis: Field required"),
        (lambda v: v["geometry"].update(slice_axis="XY"), r"geometry\.slice_axis: .*'XY'"),
        (lambda v: v["geometry"].update(input_size=1_000_000), r"geometry\.input_size: .*less than or equal to 2048 \(found 1000000\)"),
        (lambda v: v["geometry"].update(input_size=-32), r"geometry\.input_size: "),
        (lambda v: v["geometry"].update(input_size=130), r"geometry\.input_size: .*multiple of 32"),
        (lambda v: v["geometry"].update(in_plane_mm=0), r"geometry\.in_plane_mm: "),
        (lambda v: v["geometry"].update(in_plane_mm="0.5"), r"geometry\.in_plane_mm: "),
        (lambda v: v["intensity"][0].update(lower=99.9), r"intensity\.0: upper 99.5 must be above lower 99.9"),
        (lambda v: v["intensity"][0].update(upper=101), r"intensity\.0: percentiles lie between 0 and 100"),
        (lambda v: v["intensity"].clear(), r"0 entries for 1 channels"),
        (lambda v: v["training"].update(steps=0), r"training\.steps: "),
        (lambda v: v["network"].update(size="huge"), r"network\.size: .*nano"),
        (lambda v: v["network"].update(policy="../x"), r"network\.policy: "),
        (lambda v: v.update(labels={"0": "background"}), r"labels\.0: "),
        (lambda v: v.update(labels={"x": "a"}), r"labels\.x: "),
        (lambda v: v.update(format_version=2), r"format_version 2 is newer than this tool's 1"),
        (lambda v: v.update(format_version="1"), r"format_version: "),
    ],
)
def test_a_mistake_is_refused_by_name(tmp_path, change, said):
    with pytest.raises(PlanError, match=said):
        read_plan(edited(tmp_path, change))


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not valid JSON"), ("[]", "must be a JSON object"), ('{"a": 1, "a": 2}', "twice"), ('{"a": NaN}', "NaN")]
)
def test_what_is_not_a_json_object_is_refused(tmp_path, text, said):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=said):
        read_plan(tmp_path / "plan.json")


def test_a_missing_plan_says_what_to_do(tmp_path):
    with pytest.raises(PlanError, match="Run slmsam2 plan first"):
        read_plan(tmp_path / "plan.json")


def test_every_field_says_what_it_means():
    for model in (Plan, GeometryPlan, ChannelIntensity, NetworkPlan, TrainingPlan, InferencePlan, EvaluationPlan):
        for name, field in model.model_fields.items():
            nested = name in {"geometry", "network", "training", "inference", "evaluation"} and model is Plan
            assert field.description or nested, f"{model.__name__}.{name}"


def test_differences_name_key_and_both_values():
    other = plan(geometry=plan().geometry.model_copy(update={"input_size": 256}), labels={1: "a"})
    assert differences(plan(), other) == [("labels", {"1": "a", "2": "b"}, {"1": "a"}), ("geometry.input_size", 128, 256)]


def test_a_fresh_plan_replaces_an_unedited_one():
    fresh = plan(modality="CT")
    assert keep_edits(plan(), fresh) == fresh
    assert keep_edits(None, fresh) == fresh


def test_an_edited_plan_is_kept_while_the_data_stay_the_same(tmp_path):
    mine = read_plan(edited(tmp_path, lambda value: value["geometry"].update(input_size=256)))
    assert keep_edits(mine, plan()) == mine


def test_an_edited_plan_is_refused_by_key_when_the_data_changed(tmp_path):
    mine = read_plan(edited(tmp_path, lambda value: value["geometry"].update(input_size=256)))
    with pytest.raises(PlanError, match=r"geometry\.input_size is 256 where the data now ask for 128.*--overwrite"):
        keep_edits(mine, plan(fingerprint_digest="g"))
