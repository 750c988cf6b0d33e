"""Models with random weights that predict every object to be present."""

import torch

from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.model import adapters
from slmsam2_cli.model.checkpoint import (
    Header,
    Provenance,
    RequiredBase,
    load_weights,
    read_checkpoint,
    save_adapter,
    save_checkpoint,
    save_weights,
)
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.plan import AdapterPlan, NetworkPlan
from slmsam2_cli.planning.rules import decide


def sure(network):
    """The same network with a high object score for everything."""
    torch.nn.init.constant_(network.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 5.0)
    return network.eval()


def save_base(path):
    """Pretrained weights as slmsam2 pretrain writes them, with no plan inside; the file's path as text."""
    torch.manual_seed(0)
    network = NetworkPlan(policy="fifo")
    save_weights(path, sure(SlmSam2(network, 64)).state_dict(), Header(network, Provenance(pretrained="made up")))
    return str(path)


def planned(dataset):
    """The plan for a dataset, as slmsam2 plan writes it."""
    fingerprint, _ = measure(read_dataset(dataset), lambda *_: None)
    return decide(fingerprint)


def save_model(path, plan, calibration=None):
    """A model file with that plan inside, as slmsam2 finetune writes it; the network."""
    torch.manual_seed(0)
    network = sure(SlmSam2(plan.network, plan.geometry.input_size))
    save_checkpoint(path, network, plan, Provenance(pretrained="random", random=True), calibration)
    return network


def save_adapter_alone(path, base):
    """Write an adapter for the modality of a base that changes the output, without the base."""
    tuned = read_checkpoint(base)
    network = SlmSam2(tuned.network, tuned.plan.geometry.input_size)
    load_weights(network, tuned)
    adapters.add(network, tuned.plan.modality, AdapterPlan(), 0)
    with torch.no_grad():
        for parameter in adapters.branch_parameters(network, tuned.plan.modality):
            parameter.add_(0.05)
    save_adapter(path, network, tuned.plan, Provenance(pretrained=tuned.name), RequiredBase(name=tuned.name, digest=tuned.digest))
