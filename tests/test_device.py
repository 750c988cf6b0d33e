"""Which device is chosen, and how it computes what is learned from."""

import pytest
import torch

from slmsam2_cli.device import choose_device, half_precision
from slmsam2_cli.errors import DeviceError


def by_cudnn():
    return torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("chosen", [True, False])
def test_attention_whose_gradients_are_not_always_finite_is_off_while_something_is_learned_and_as_it_was_afterwards(chosen):
    before = by_cudnn()
    torch.backends.cuda.enable_cudnn_sdp(chosen)
    try:
        with half_precision(torch.device("cpu")):
            assert not by_cudnn() and not torch.is_autocast_enabled("cpu")
        assert by_cudnn() == chosen
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_absent_is_an_error_that_says_what_to_do():
    with pytest.raises(DeviceError, match="--device cuda: .*--device auto"):
        choose_device("cuda")
