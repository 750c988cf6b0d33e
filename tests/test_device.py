"""Which device is chosen, and what is settled with it."""

import pytest
import torch

from slmsam2_cli.device import choose_device
from slmsam2_cli.errors import DeviceError


def test_attention_whose_gradients_are_not_always_finite_is_off_once_a_device_is_chosen():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        choose_device("cpu")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_absent_is_an_error_that_says_what_to_do():
    with pytest.raises(DeviceError, match="--device cuda: .*--device auto"):
        choose_device("cuda")
