"""Models that segment without having learned: random weights that believe every object to be present."""

import torch

from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.model import adapters
from slmsam2_cli.model.checkpoint import Needs, Provenance, fit, read_checkpoint, save_adapter, save_checkpoint
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.plan import AdapterPlan
from slmsam2_cli.planning.rules import decide


def sure(network):
    """The same network, to which everything is present."""
    torch.nn.init.constant_(network.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 5.0)
    return network.eval()


def planned(dataset):
    """The plan for a data set, as slmsam2 plan decides it."""
    fingerprint, _ = measure(read_dataset(dataset), lambda *_: None)
    return decide(fingerprint)


def save_model(path, plan, calibration=None):
    """A model file with that plan inside, as slmsam2 finetune writes it; the network."""
    torch.manual_seed(0)
    network = sure(SlmSam2(plan.network, plan.geometry.input_size))
    save_checkpoint(path, network, plan, Provenance(base="random", random=True), calibration)
    return network


def save_adapter_alone(path, base):
    """An adapter of the base's modality that changes what the network sees, without the base."""
    tuned = read_checkpoint(base)
    network = SlmSam2(tuned.network, tuned.plan.geometry.input_size)
    fit(network, tuned)
    adapters.add(network, tuned.plan.modality, AdapterPlan(), 0)
    with torch.no_grad():
        for parameter in adapters.branch_parameters(network, tuned.plan.modality):
            parameter.add_(0.05)
    save_adapter(path, network, tuned.plan.modality, tuned.plan, Provenance(base=tuned.name), Needs(name=tuned.name, digest=tuned.digest))
