"""56 small steps of pretraining on a CPU: the loss falls, and propagation from one slice of a phantom beats copying it."""

import csv
import json

import nibabel
import numpy as np
import pytest

from slmsam2_cli.commands.predict import predict
from slmsam2_cli.commands.pretrain import pretrain
from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.dataset.prompts import choose_slice
from slmsam2_cli.evaluation.metrics import dice
from slmsam2_cli.pretraining.recipe import SMOKE

LABELS = (1, 2, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, recipe = tmp_path_factory.mktemp("smoke") / "run", tmp_path_factory.mktemp("recipe") / "smoke.json"
    recipe.write_text(json.dumps(json.loads(SMOKE.read_text()) | {"slices_per_step": 12}))
    assert pretrain(folder, recipe=recipe, steps=56, device="cpu", threads=1) == 0
    return folder


def test_the_loss_falls_with_single_images_and_with_clips(run):
    rows = list(csv.DictReader((run / "log.csv").open()))
    for phase in ("1", "3"):
        totals = [float(row["total"]) for row in rows if row["phase"] == phase]
        count = len(totals) // 4
        assert count >= 2 and np.mean(totals[-count:]) < np.mean(totals[:count])


def test_propagation_on_phantoms_beats_copying_the_annotated_slice(run, tmp_path):
    write_phantom_dataset(tmp_path / "data", cases=2, test_cases=0, shape=(16, 48, 48))
    data, masks = read_dataset(tmp_path / "data"), tmp_path / "masks"
    weights = str(run / "nano.safetensors")
    assert predict(data.root / "imagesTr", masks, simulate_from=data.root / "labelsTr", weights=weights, report=False, device="cpu") == 0
    found, copied = [], []
    for case in data.training:
        truth, predicted = (np.asarray(nibabel.load(path).dataobj).T for path in (case.label, masks / case.label.name))
        for value in LABELS:
            mask = truth == value
            middle = mask[choose_slice(mask.sum(axis=(1, 2)), "middle")]
            found.append(dice(mask, predicted == value))
            copied.append(dice(mask, np.broadcast_to(middle, mask.shape)))
    assert np.mean(found) > np.mean(copied)
