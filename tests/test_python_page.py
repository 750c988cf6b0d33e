"""The page about Python keeps its word: every example on it runs, in the order in which it is read."""

import contextlib
import io
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from made_models import planned, save_adapter_alone, save_model

import slmsam2_cli
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "python.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def put_files_into(folder):
    """The files that the page speaks of, with random weights inside."""
    data = folder / "dataset"
    write_phantom_dataset(data, cases=1, test_cases=0, seed=5, shape=(8, 40, 40))
    save_model(folder / "model.safetensors", planned(data))
    save_adapter_alone(folder / "adapter.safetensors", folder / "model.safetensors")
    torch.save({"model": SlmSam2(NetworkPlan(size="nano", policy="fifo"), 64).state_dict()}, folder / "sam2.1_hiera_tiny.pt")
    shutil.copy(data / "imagesTr" / "phantom_000.nii.gz", folder / "image.nii.gz")
    truth = nibabel.load(data / "labelsTr" / "phantom_000.nii.gz")
    painted = np.zeros(truth.shape, np.uint8)
    painted[..., 4] = np.asarray(truth.dataobj)[..., 4]
    nibabel.save(nibabel.Nifti1Image(painted, truth.affine, truth.header), folder / "prompt.nii.gz")


@pytest.fixture(scope="module")
def after(tmp_path_factory):
    """What the names of the page mean after its last line, and what was printed on the way."""
    folder = tmp_path_factory.mktemp("page")
    put_files_into(folder)
    names, printed = {}, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        for block in BLOCKS:
            exec(compile(block, str(PAGE), "exec"), names)
    return names | {"printed": printed.getvalue(), "folder": folder}


def test_the_first_example_is_ten_lines_at_most():
    assert 0 < len(BLOCKS[0].splitlines()) <= 10


def test_every_public_name_has_its_place_on_the_page():
    assert {name for name in slmsam2_cli.__all__ if f"`{name}`" not in TEXT and f"## {name}\n" not in TEXT} == set()


def test_every_example_runs_and_gives_arrays_of_the_shapes_that_the_page_tells(after):
    slices, count, size = after["slices"], len(after["slices"]), after["slices"].shape[1:]
    assert list(after["found"]) == ["organ", "vessel"]
    for track in after["found"].values():
        assert (track.mask.shape, track.confidence.shape, track.disagreement.shape) == (slices.shape, (count,), (count,))
    px, features = after["tuned"].input_size, after["features"]
    channels = features.top.shape[1]
    assert features.top.shape == (4, channels, px // 16, px // 16)
    assert [part.shape for part in features.fine] == [(4, channels // 8, px // 4, px // 4), (4, channels // 4, px // 8, px // 8)]
    assert [match.mask.shape for match in after["matches"]] == [size, size, (70, 85)]
    assert after["matches"][0].nearest == 1


def test_the_given_slices_of_the_page_come_back_as_given(after):
    organ, labels = after["found"]["organ"].mask, after["labels"]
    assert np.array_equal(organ[8], labels[8] == 1) and np.array_equal(organ[14], labels[14] == 1) and not organ[20:].any()
    painted, saved = (nibabel.load(after["folder"] / name) for name in ("prompt.nii.gz", "mask.nii.gz"))
    assert np.array_equal(np.asarray(saved.dataobj)[..., 4], np.asarray(painted.dataobj)[..., 4])
    assert not after["result"].labels[0].any()


def test_the_page_prints_what_it_says_is_printed(after):
    (said,) = re.findall(r"print\(error\)  # (.*)$", TEXT, re.MULTILINE)
    assert after["printed"] == f"{said}\n"


def test_the_links_of_the_page_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT):
        assert (PAGE.parent / target).is_file()
