"""The choice of the device, and mixed precision."""

import pytest
import torch

from slmsam2_cli.device import choose_device, half_precision
from slmsam2_cli.errors import DeviceError


def by_cudnn():
    return torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("chosen", [True, False])
def test_half_precision_switches_cudnn_attention_off_and_back(chosen):
    before = by_cudnn()
    torch.backends.cuda.enable_cudnn_sdp(chosen)
    try:
        with half_precision(torch.device("cpu")):
            assert not by_cudnn() and not torch.is_autocast_enabled("cpu")
        assert by_cudnn() == chosen
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_error_for_an_absent_device_names_the_device_option():
    with pytest.raises(DeviceError, match="--device cuda: .*--device auto"):
        choose_device("cuda")
