"""TIFF stacks: what ImageJ and OME write beside the pixels is used, and pages that are no slices are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slmsam2_cli.errors import CaseError
from slmsam2_cli.io.volume import Volume, read_image

PAGES = np.arange(3 * 8 * 9, dtype=np.uint16).reshape(3, 8, 9)


def tiff(folder: Path, description: str = "", pages: np.ndarray = PAGES, **tags: object) -> Volume:
    info = {270: description} | {int(name[1:]): value for name, value in tags.items()}
    images = [Image.fromarray(page) for page in pages]
    images[0].save(folder / "a.tif", save_all=True, append_images=images[1:], tiffinfo=info)
    return read_image([folder / "a.tif"], case="c", root=folder)


def test_the_scale_of_values_that_imagej_states_is_applied(tmp_path: Path) -> None:
    found = tiff(tmp_path, "ImageJ=1.54f\nimages=3\nslices=3\ncf=0\nc0=-32768.0\nc1=1.0\nvunit=Gray Value\n", PAGES + 32668)
    assert np.array_equal(found.voxels[0], PAGES.astype(int) - 100)
    halves = tiff(tmp_path, "ImageJ=1.54f\nimages=3\nslices=3\ncf=0\nc0=2\nc1=0.5\n")
    assert np.array_equal(halves.voxels[0], PAGES / 2 + 2)


def test_scales_beyond_whole_numbers_of_32_bits_are_kept(tmp_path: Path) -> None:
    found = tiff(tmp_path, "ImageJ=1.54f\nimages=3\nslices=3\ncf=0\nc0=0\nc1=100000000\n")
    assert np.allclose(found.voxels[0], PAGES * 1e8)


def test_the_channels_of_one_colour_picture_are_no_stack(tmp_path: Path) -> None:
    colours = np.zeros((1, 8, 9, 3), np.uint8)
    assert tiff(tmp_path, '<OME><Pixels SizeC="3" SizeT="1"/></OME>', colours).voxels.shape == (3, 1, 8, 9)


def test_the_spacing_that_imagej_states_is_used(tmp_path: Path) -> None:
    found = tiff(tmp_path, "ImageJ=1.54f\nimages=3\nslices=3\nspacing=2.5\nunit=mm\n", t282=2.0, t283=4.0)
    assert found.grid.spacing_mm == (2.5, 0.25, 0.5)
    assert found.source.uncertain == {"orientation"}
    microns = tiff(tmp_path, "ImageJ=1.54f\nimages=3\nslices=3\nspacing=500\nunit=\\u00b5m\n", t282=0.01, t283=0.01)
    assert np.allclose(microns.grid.spacing_mm, (0.5, 0.1, 0.1))


def test_the_spacing_of_an_ome_tiff_is_used(tmp_path: Path) -> None:
    across = 'PhysicalSizeX="0.5" PhysicalSizeXUnit="mm" PhysicalSizeY="250"'
    sizes = f'SizeC="1" SizeT="1" SizeZ="3" {across} PhysicalSizeZ="2" PhysicalSizeZUnit="mm"'
    found = tiff(tmp_path, f'<?xml version="1.0"?><OME><Image><Pixels {sizes}/></Image></OME>')
    assert np.allclose(found.grid.spacing_mm, (2, 0.25, 0.5))


def test_without_a_description_pixels_count_as_1_mm(tmp_path: Path) -> None:
    found = tiff(tmp_path, t282=72.0, t283=72.0)  # printers' dots per inch say nothing of the object
    assert found.grid.spacing_mm == (1, 1, 1)
    assert np.array_equal(found.voxels[0], PAGES)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("ImageJ=1.54f\nimages=3\nchannels=3\n", "a stack of 3 channels"),
        ("ImageJ=1.54f\nimages=3\nframes=3\n", "a stack of 3 frames"),
        ("ImageJ=1.54f\nimages=7\nslices=7\n", "says 7 slices, and the file holds 3 pages"),
        ("ImageJ=1.54f\nimages=3\nslices=3\ncf=1\nc0=1\nc1=2\nc2=3\n", "no straight line"),
        ('<OME><Pixels SizeC="3" SizeT="1"/></OME>', "a stack of 3 channels"),
    ],
)
def test_stacks_whose_pages_are_no_slices_are_refused(tmp_path: Path, description: str, message: str) -> None:
    with pytest.raises(CaseError, match=message):
        tiff(tmp_path, description)
