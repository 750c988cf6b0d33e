"""A plan can be read, edited and compared; unknown keys and other format versions are rejected."""

from __future__ import annotations

import json

import pytest

from slmsam2_cli.errors import PlanError
from slmsam2_cli.planning.plan import (
    MAX_CHANNELS,
    POLICY_STREAMS,
    AdapterPlan,
    ChannelIntensity,
    EvaluationPlan,
    GeometryPlan,
    InferencePlan,
    NetworkPlan,
    Plan,
    TrainingPlan,
    channel_groups,
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
    """Write a plan, change the file and return its path."""
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


def test_a_manual_edit_is_detected(tmp_path):
    path = edited(tmp_path, lambda value: value["geometry"].update(input_size=256))
    assert not plan().edited
    assert read_plan(path).edited


def test_a_changed_reason_does_not_count_as_a_manual_edit(tmp_path):
    assert not read_plan(edited(tmp_path, lambda value: value["reasons"].update(modality="by hand"))).edited


@pytest.mark.parametrize(
    ("change", "message"),
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
        (lambda v: v["intensity"][0].update(upper=101), r"intensity\.0: percentiles must lie between 0 and 100"),
        (lambda v: v["intensity"].clear(), r"0 entries for 1 channels"),
        (lambda v: v["training"].update(steps=0), r"training\.steps: "),
        (lambda v: v["network"].update(size="huge"), r"network\.size: .*nano"),
        (lambda v: v["network"].update(policy="../x"), r"network\.policy: must be one of fifo, shortlong, .* \(found '../x'\)"),
        (lambda v: v["training"].update(adapters={"kind": "bottleneck"}), r"training\.adapters\.kind: unknown key"),
        (lambda v: v.update(labels={"0": "background"}), r"labels\.0: "),
        (lambda v: v.update(labels={"x": "a"}), r"labels\.x: "),
        (
            lambda v: v.update(format_version=1),
            r"format_version 1 of an earlier slmsam2 is no longer supported .*plan --overwrite to create",
        ),
        (lambda v: v.update(format_version=3), r"format_version 3 is newer than the supported 2. Update slmsam2"),
        (lambda v: v.update(format_version="2"), r"format_version: "),
    ],
)
def test_an_invalid_plan_is_rejected_with_the_key(tmp_path, change, message):
    with pytest.raises(PlanError, match=message):
        read_plan(edited(tmp_path, change))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "must be a JSON object"), ('{"a": 1, "a": 2}', "twice"), ('{"a": NaN}', "NaN")]
)
def test_a_file_that_is_no_json_object_is_rejected(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        read_plan(tmp_path / "plan.json")


def test_a_storage_size_of_null_is_the_input_size(tmp_path):
    assert read_plan(edited(tmp_path, lambda value: value["geometry"].update(storage_size=None))) == plan()


def test_a_wrong_input_size_is_named_once(tmp_path):
    with pytest.raises(PlanError, match=r"geometry\.input_size") as caught:
        read_plan(edited(tmp_path, lambda value: value["geometry"].update(input_size="large")))
    assert "storage_size" not in str(caught.value)


def test_the_error_for_a_missing_plan_names_the_command_to_run(tmp_path):
    with pytest.raises(PlanError, match="Run slmsam2 plan first"):
        read_plan(tmp_path / "plan.json")


def test_every_field_has_a_description():
    for model in (Plan, GeometryPlan, ChannelIntensity, NetworkPlan, AdapterPlan, TrainingPlan, InferencePlan, EvaluationPlan):
        for name, field in model.model_fields.items():
            nested = name in {"geometry", "network", "training", "inference", "evaluation"} and model is Plan
            assert field.description or nested, f"{model.__name__}.{name}"


def test_differences_name_key_and_both_values():
    other = plan(geometry=plan().geometry.model_copy(update={"input_size": 256, "storage_size": 256}), labels={1: "a"})
    assert differences(plan(), other) == [("labels", {"1": "a", "2": "b"}, {"1": "a"}), ("geometry.input_size", 128, 256)]


def test_a_fresh_plan_replaces_an_unedited_one():
    fresh = plan(modality="CT")
    assert keep_edits(plan(), fresh) == fresh
    assert keep_edits(None, fresh) == fresh


def test_an_edited_plan_is_kept_while_the_dataset_is_unchanged(tmp_path):
    mine = read_plan(edited(tmp_path, lambda value: value["geometry"].update(input_size=256)))
    assert keep_edits(mine, plan()) == mine


def test_an_edited_plan_is_rejected_with_its_keys_when_the_dataset_changed(tmp_path):
    mine = read_plan(edited(tmp_path, lambda value: value["geometry"].update(input_size=256)))
    with pytest.raises(PlanError, match=r"geometry\.input_size is 256 \(new default: 128\).*--overwrite"):
        keep_edits(mine, plan(fingerprint_digest="g"))


@pytest.mark.parametrize("policy", POLICY_STREAMS)
def test_only_settings_that_differ_from_their_default_are_written(policy):
    assert NetworkPlan(policy=policy).model_dump() == {"size": "nano", "policy": policy, "fuser": "gated"}
    assert NetworkPlan(policy=policy, bank_read=3).model_dump()["bank_read"] == 3


@pytest.mark.parametrize(
    ("policy", "short_stream", "bank"),
    [("fifo", False, False), ("shortlong", True, False), ("selfsort", False, True), ("shortlong+selfsort", True, True)],
)
def test_a_policy_declares_its_short_stream_and_its_bank(policy, short_stream, bank):
    network = NetworkPlan(policy=policy)
    assert (network.has_short_stream, network.has_bank) == (short_stream, bank)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(4, [[0, 1], [2], [3]]), (5, [[0, 1], [2, 3], [4]]), (6, [[0, 1], [2, 3], [4, 5]]), (7, [[0, 1, 2], [3, 4], [5, 6]])],
)
def test_channels_are_grouped_with_their_neighbours_and_the_first_groups_are_larger(channels, groups):
    assert [list(group) for group in channel_groups(channels)] == groups


@pytest.mark.parametrize("channels", range(4, MAX_CHANNELS + 1))
def test_every_channel_is_in_exactly_one_group(channels):
    assert [index for group in channel_groups(channels) for index in group] == list(range(channels))
