"""The label U-Net: output channels, saving, adjacent slices, crop."""

import pytest
import torch

from slmsam2_cli.errors import WeightsError
from slmsam2_cli.model.checkpoint import Checkpoint, label_unet_of
from slmsam2_cli.model.label_unet import PREFIX, LabelUNet, label_unet_roi, with_adjacent_slices, without_label_unet
from slmsam2_cli.model.roi import RoiCrop


def tensors(**changes):
    made = LabelUNet(2, [3, 7], 32, width=8)
    return {f"{PREFIX}{name}": tensor for name, tensor in made.state_dict().items()} | changes


def read(state):
    """The label U-Net of a file with these tensors."""
    return label_unet_of(Checkpoint("model.safetensors", state, digest=""))


def test_the_output_has_a_channel_for_the_background_and_one_per_label():
    assert LabelUNet(2, [3, 7], 32, width=8)(torch.rand(5, 10, 32, 32)).shape == (5, 3, 32, 32)


def test_channels_labels_and_input_size_are_read_from_the_tensors():
    other = {"image_encoder.weight": torch.zeros(1)}
    found = read(tensors() | other)
    assert (found.channels, found.values, found.input_size) == (2, [3, 7], 32)
    assert without_label_unet(tensors() | other) == other
    assert read(other) is None


def test_a_label_unet_gives_the_same_logits_after_reading():
    torch.manual_seed(0)
    made, slices = LabelUNet(1, [1], 16, width=8), torch.rand(2, 5, 16, 16)
    again = read({f"{PREFIX}{name}": tensor for name, tensor in made.state_dict().items()})
    assert torch.equal(made(slices), again(slices))


@pytest.mark.parametrize(
    "changes",
    [
        {f"{PREFIX}logits.weight": torch.zeros(1)},
        {f"{PREFIX}px_seen": torch.tensor(12)},
        {f"{PREFIX}px_seen": torch.tensor(2**20)},
        {f"{PREFIX}labels": torch.tensor([1])},
        {f"{PREFIX}more": torch.zeros(1)},
    ],
)
def test_misshapen_or_unexpected_tensors_are_rejected(changes):
    with pytest.raises(WeightsError, match=r"^model.safetensors: corrupt: (input size|the label U-Net is incomplete)"):
        read(tensors(**changes))


def test_a_missing_tensor_is_rejected():
    with pytest.raises(WeightsError, match="model.safetensors: corrupt: the label U-Net is incomplete .*labels"):
        read({name: tensor for name, tensor in tensors().items() if not name.endswith("labels")})


def test_beyond_the_ends_of_a_stack_the_outermost_slice_is_repeated():
    stack = torch.arange(3.0).view(3, 1, 1, 1)
    assert with_adjacent_slices(stack, 0).flatten().tolist() == [0, 0, 0, 1, 2]
    assert with_adjacent_slices(stack, 2).flatten().tolist() == [0, 1, 2, 2, 2]


def test_the_crop_is_twice_as_wide_as_all_annotated_masks():
    one, other = torch.zeros(64, 64), torch.zeros(64, 64)
    one[20:24, 24:28], other[30:40, 24:28] = 1, 1
    assert label_unet_roi([one, other], 64) == RoiCrop(10, 6, 40)  # rows 20 to 40, so 40 pixels around (30, 26)
