"""Which model and which plan: what is followed, what is said, and what comes of it."""

from functools import cache

import pytest
import torch
from published import tuned_slm_sam2

from slmsam2_cli.errors import PlanError, WeightsError
from slmsam2_cli.inference.load_model import build_model, choose_model, fuser_of
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.checkpoint import Provenance, read_checkpoint, save_checkpoint
from slmsam2_cli.model.label_unet import LabelUNet
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import ChannelIntensity, GeometryPlan, NetworkPlan, Plan, TrainingPlan, write_plan
from slmsam2_cli.workspace import Workspace

PX = 64
TABLE = Calibration(method="isotonic", confidence=(0.0, 1.0), dice=(0.0, 0.5), slices=99, error_before=0.3, error_after=0.1)


@cache
def network(**options):
    torch.manual_seed(0)
    return SlmSam2(NetworkPlan(size="nano", **options), PX).eval()


def plan(modality="MR", channels=("T1",), **options):
    return Plan(
        tool_version="0",
        dataset_name="x",
        modality=modality,
        channels=channels,
        labels={1: "organ"},
        geometry=GeometryPlan(slice_axis="SI", in_plane_mm=1.0, through_plane_mm=None, input_size=PX, crop_to_nonzero=True),
        intensity=tuple(ChannelIntensity(name=name, scheme="percentile", lower=0.5, upper=99.5) for name in channels),
        network=NetworkPlan(**{"size": "nano", **options}),
        training=TrainingPlan(steps=4, clips_per_step=1, learning_rate=1e-3, warmup_steps=1, weight_decay=0.01),
        fingerprint_digest="0",
    )


def model_file(folder, model, made_for, table=None):
    path = folder / "model.safetensors"
    save_checkpoint(path, model, made_for, Provenance(pretrained="base"), table)
    return path


def workspace_with(folder, planned):
    workspace = Workspace(folder / "space")
    write_plan(workspace.plan, planned)
    return workspace


# The workspace's plan and weights that were made for another


def test_a_plan_for_another_size_than_the_weights_is_followed_with_a_warning(tmp_path, capsys):
    workspace, base = workspace_with(tmp_path, plan(size="tiny")), model_file(tmp_path, network(), plan())
    _, followed = choose_model(workspace, None, str(base), None)
    said = capsys.readouterr().err
    assert "warning: plan.json is for network tiny: its 64 px may not suit model.safetensors, of network nano. Run slmsam2" in said
    assert "slmsam2 plan --network nano --overwrite" in said
    assert followed.network.size == "nano" and followed.geometry == plan().geometry


def test_a_plan_for_the_size_of_the_weights_is_followed_silently(tmp_path, capsys):
    workspace, base = workspace_with(tmp_path, plan()), model_file(tmp_path, network(), plan())
    choose_model(workspace, None, str(base), None)
    assert "plan.json" not in capsys.readouterr().err


@pytest.mark.parametrize("named", ["model", "weights"])
def test_a_published_slm_sam2_predicts_with_its_own_fuser_whatever_the_plan_says(named, tmp_path, capsys):
    workspace, path = workspace_with(tmp_path, plan(fuser="gated")), tuned_slm_sam2(tmp_path / "slm.pt")
    names = {"model": (path, None), "weights": (None, str(path))}[named]
    checkpoint, followed = choose_model(workspace, *names, None)
    assert followed.network.fuser == "sum"
    assert "warning: plan.json has network.fuser gated, but slm.pt has sum: using sum" in capsys.readouterr().err
    assert build_model(checkpoint, followed).stream_fuser.gate is None


def test_weights_without_short_memory_have_no_fuser(tmp_path):
    fifo, both = ({"policy": policy, "fuser": "sum"} for policy in ("fifo", "shortlong"))
    assert fuser_of(read_checkpoint(model_file(tmp_path, network(**fifo), plan(**fifo)))) is None
    assert fuser_of(read_checkpoint(model_file(tmp_path, network(**both), plan(**both)))) == "sum"


def test_weights_without_a_plan_are_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(PlanError, match=r"slm\.pt: no plan .*Run slmsam2 plan"):
        choose_model(Workspace(tmp_path / "empty"), tuned_slm_sam2(tmp_path / "slm.pt"), None, None)


# Channels


def test_weights_not_trained_on_four_channels_get_means_and_a_warning(tmp_path, capsys):
    four = plan(channels=("T1", "T2", "FLAIR", "T1c"))
    workspace, base = workspace_with(tmp_path, four), model_file(tmp_path, network(), plan())
    model = build_model(*choose_model(workspace, None, str(base), None))
    assert "model.safetensors was not trained on 4 channels: it gets their means" in capsys.readouterr().err
    frames = torch.rand(1, 4, PX, PX, generator=torch.Generator().manual_seed(0))
    shown = torch.stack([frames[:, :2].mean(dim=1), frames[:, 2], frames[:, 3]], dim=1)
    with torch.no_grad():
        assert torch.allclose(model.encode(frames).top, network().encode(shown).top, atol=1e-5)


def test_weights_fine_tuned_on_four_channels_are_rejected_for_a_plan_of_five(tmp_path):
    four, five = plan(channels=("T1", "T2", "FLAIR", "T1c")), plan(channels=("T1", "T2", "FLAIR", "T1c", "ADC"))
    tuned = build_model(*choose_model(workspace_with(tmp_path, four), None, str(model_file(tmp_path, network(), plan())), None))
    base = model_file(tmp_path, tuned, four)
    with pytest.raises(WeightsError, match=r"model\.safetensors: fine-tuned on 4 channels of MR, but the plan has 5\. Use other weights"):
        build_model(*choose_model(workspace_with(tmp_path, five), None, str(base), None))


def test_a_channel_projection_is_no_adapter(tmp_path, capsys):
    four = plan(channels=("T1", "T2", "FLAIR", "T1c"))
    tuned = build_model(*choose_model(workspace_with(tmp_path, four), None, str(model_file(tmp_path, network(), plan())), None))
    base = model_file(tmp_path, tuned, four)
    assert read_checkpoint(base).modalities == ()
    choose_model(workspace_with(tmp_path, plan(modality="CT")), None, str(base), None)
    assert "has adapters" not in capsys.readouterr().err


# Confidence


@pytest.mark.parametrize(
    ("table", "options", "said"),
    [
        (None, {}, "the model is not calibrated for this modality; confidence values are raw"),
        (None, {"policy": "shortlong+selfsort"}, "confidence values are raw; the memory policy uses raw values too"),
        (TABLE, {"policy": "shortlong+selfsort"}, "confidence is calibrated; the memory policy uses calibrated values"),
        (TABLE, {"object_score_gate": True}, "confidence is calibrated; the memory policy uses calibrated values"),
        (TABLE, {}, ""),
    ],
)
def test_the_message_says_which_confidence_the_memory_uses(table, options, said, tmp_path, capsys):
    path = model_file(tmp_path, network(**options), plan(**options), table)
    model = build_model(*choose_model(None, path, None, None))
    lines = [line for line in capsys.readouterr().err.splitlines() if "confidence" in line]
    assert len(lines) == bool(said) and all(line.endswith(said) for line in lines)
    assert model.calibration == table


def test_a_calibration_for_another_modality_is_not_used(tmp_path, capsys):
    workspace, base = workspace_with(tmp_path, plan(modality="CT")), model_file(tmp_path, network(), plan(modality="MR"), TABLE)
    assert build_model(*choose_model(workspace, None, str(base), None)).calibration is None
    assert "the model is not calibrated" in capsys.readouterr().err


# What recognises the labels


def test_a_label_unet_is_used_only_for_the_labels_and_channels_it_was_trained_on(tmp_path):
    tuned = SlmSam2(NetworkPlan(size="nano"), PX)
    tuned.label_unet = LabelUNet(1, [1], 32, width=8)
    checkpoint = read_checkpoint(model_file(tmp_path, tuned, plan()))
    assert build_model(checkpoint, plan()).label_unet.values == [1]
    assert build_model(checkpoint, plan().model_copy(update={"labels": {1: "another"}})).label_unet is None
    assert build_model(checkpoint, plan(channels=("T2",))).label_unet is None
