"""The recipe: the bundled ones are valid, and invalid ones are rejected in one line that names the key."""

import json

import pytest
import torch

from slmsam2_cli.errors import PlanError
from slmsam2_cli.pretraining.recipe import NANO, SMOKE, read_recipe
from slmsam2_cli.pretraining.step import OBJECT_SCORE_BIAS, build_model, export_state


def changed(tmp_path, **changes):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(json.loads(NANO.read_text()) | changes))
    return path


@pytest.mark.parametrize("path", [NANO, SMOKE], ids=lambda path: path.stem)
def test_the_bundled_recipes_train_nano_by_every_policy_from_images_to_long_clips(path):
    recipe = read_recipe(path)
    assert recipe.network.size == "nano" and recipe.network.has_short_stream
    assert set(recipe.memory.policies) == {"fifo", "shortlong", "selfsort", "shortlong+selfsort"}
    assert recipe.phases[0].lengths == (1,) and max(recipe.phases[-1].lengths) >= 6


def test_a_recipe_written_as_json_is_read_unchanged(tmp_path):
    recipe = read_recipe(NANO)
    path = tmp_path / "again.json"
    path.write_text(recipe.model_dump_json())
    assert read_recipe(path) == recipe


def test_the_phase_follows_from_the_share_of_the_run(tmp_path):
    phases = [{"until": 0.25, "lengths": [1]}, {"until": 0.5, "lengths": [2]}, {"until": 1.0, "lengths": [8]}]
    recipe = read_recipe(changed(tmp_path, phases=phases))
    assert [recipe.phase(done).lengths[0] for done in (0.0, 0.24, 0.25, 0.5, 0.99, 1.0)] == [1, 1, 2, 8, 8, 8]


def test_a_phase_can_override_the_share_of_ends_in_the_clip(tmp_path):
    phases = [{"until": 0.5, "lengths": [3], "ends_in_clip": 0.2}, {"until": 1.0, "lengths": [8]}]
    recipe = read_recipe(changed(tmp_path, phases=phases))
    early, late = recipe.volumes_at(0.0), recipe.volumes_at(0.5)
    assert (early.anatomy.ends_in_clip, early.ending_weight) == (0.2, 1.0)
    assert late == recipe.volumes
    assert early.model_copy(update={"anatomy": late.anatomy, "ending_weight": late.ending_weight}) == late


def test_the_digest_depends_on_everything_but_the_length_of_the_run(tmp_path):
    recipe = read_recipe(NANO)
    assert read_recipe(changed(tmp_path, steps=7, minutes=1.0)).digest == recipe.digest
    assert read_recipe(changed(tmp_path, seed=1)).digest != recipe.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_speed": 1}, "learning_speed: unknown key"),
        ({"prompts": {"boxes": 1}}, "prompts.boxes: unknown key"),
        ({"volumes": {"bones": 1}}, "volumes.bones: unknown key"),
        ({"input_size": 100}, "input_size: .*multiple of 32"),
        ({"other_input_sizes": {"100": 0.1}}, "other_input_sizes.100: .*multiple of 32"),
        ({"other_input_sizes": {"64": 0.6, "96": 0.6}}, "other_input_sizes: shares must be"),
        ({"learning_rate": 0}, "learning_rate: .*greater than 0"),
        ({"phases": [{"until": 0.5, "lengths": [1]}]}, "phases: until must increase from phase to phase and end at 1, found 0.5"),
        ({"phases": [{"until": 1.0, "lengths": [0]}]}, "a clip must have 1 to 64 slices"),
        ({"prompts": {"box": 0.8, "points": 0.4}}, "box and points must not exceed 1 together, found 1.2"),
        ({"memory": {"policies": {}}}, "memory.*at least one of them greater than 0"),
        ({"network": {"size": "nano", "policy": "fifo"}}, "shortlong needs a short memory stream, which network.policy fifo lacks"),
        ({"format_version": 1}, "format_version 1 of an earlier slmsam2 .*Rename its keys"),
        ({"format_version": 3}, "format_version 3 is newer .*Update slmsam2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_invalid_recipe_is_rejected_in_one_line(tmp_path, changes, message):
    with pytest.raises(PlanError, match=message) as error:
        read_recipe(changed(tmp_path, **changes))
    assert "\n" not in str(error.value) and "mine.json" in str(error.value)


def test_a_missing_file_and_invalid_json_are_rejected(tmp_path):
    with pytest.raises(PlanError, match="no recipe at"):
        read_recipe(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(PlanError, match="broken.json.*not valid JSON"):
        read_recipe(tmp_path / "broken.json")


def test_object_score_shift_changes_the_bias_of_the_object_score_head_and_nothing_else():
    model = build_model(read_recipe(SMOKE), torch.device("cpu"))
    plain, shifted = export_state(model, 0.0), export_state(model, -0.75)
    changed = {name for name in plain if not torch.equal(plain[name], shifted[name])}
    assert changed == {OBJECT_SCORE_BIAS} and shifted[OBJECT_SCORE_BIAS].dtype == torch.float16
    assert float(shifted[OBJECT_SCORE_BIAS] - plain[OBJECT_SCORE_BIAS]) == pytest.approx(-0.75, abs=1e-3)
    assert not torch.equal(model.state_dict()[OBJECT_SCORE_BIAS].half(), shifted[OBJECT_SCORE_BIAS])  # the model itself is unchanged


def test_the_recipes_of_parts_two_and_three_are_valid():
    assets = NANO.parent
    assert read_recipe(assets / "nano-through.json").object_score_shift == -0.7
    assert read_recipe(assets / "nano-longer.json").object_score_shift == read_recipe(NANO).object_score_shift == 0.0
