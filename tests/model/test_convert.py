"""Weights of other projects: recognised, converted exactly, rejected when incomplete, and never executed."""

import io
import pickle
import re
import zipfile

import pytest
import sam2.sam2_video_predictor as stock
import torch
from golden.sam2_keys import GOLDEN, SIZES, compact, configuration, stock_shapes, text
from omegaconf import OmegaConf
from published import as_the_authors_name_them

from slmsam2_cli.errors import WeightsError
from slmsam2_cli.inference.propagation import ABSENT, AnnotatedSlice, PropagationOptions, propagate
from slmsam2_cli.model.convert import convert_state, expected_shapes, read_pt, shape_mismatch
from slmsam2_cli.model.sam2_config import sam2_parts
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan

PX, SLICES, START = 64, 12, 3
ONLY_IN_2_1 = {"no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias"}


def network(size="nano", policy="fifo", **others):
    return NetworkPlan(size=size, policy=policy, **others)


def build(size="nano", seed=0, **others):
    torch.manual_seed(seed)
    return SlmSam2(network(size, **others), PX).eval()


def unallocated(size="tiny", **others):
    """A state of the right shapes that holds no memory."""
    return {name: torch.empty(shape, device="meta") for name, shape in expected_shapes(network(size, **others)).items()}


# SAM 2's tensors


def test_the_golden_list_of_tensors_is_that_of_the_installed_sam2():
    assert GOLDEN.read_text() == text()


@pytest.mark.parametrize("size", SIZES)
def test_our_model_with_fifo_has_exactly_the_tensors_of_sam2_1(size):
    sections = dict(re.findall(r"^# (\w+)\n((?:[^#].*\n)*)", GOLDEN.read_text(), re.MULTILINE))
    golden = sorted((sections["all"] + sections[size]).splitlines())
    assert compact({name: tuple(shape) for name, shape in expected_shapes(network(size)).items()}) == golden


@pytest.mark.parametrize("size", SIZES)
def test_sam2_0_lacks_three_tensors_and_differs_in_nothing_else(size):
    newer, older = stock_shapes(".1", size), stock_shapes("", size)
    assert {name: shape for name, shape in newer.items() if name not in ONLY_IN_2_1} == older
    assert set(newer) - set(older) == ONLY_IN_2_1


def test_a_layout_is_that_of_the_model_itself():
    for policy, fuser in (("fifo", "gated"), ("shortlong", "gated"), ("shortlong", "sum")):
        plan = network("nano", policy, fuser=fuser)
        assert expected_shapes(plan) == {name: tensor.shape for name, tensor in SlmSam2(plan, 128).state_dict().items()}


# Families and sizes


@pytest.mark.parametrize("size", [*SIZES, "nano"])
def test_sam2_1_is_recognised_at_every_size(size):
    found = convert_state("x.pt", unallocated(size))
    assert (found.family, found.network.size, found.network.policy, found.notes) == ("SAM 2.1", size, "fifo", ())


@pytest.mark.parametrize("size", SIZES)
def test_sam2_0_is_recognised_and_what_it_lacks_becomes_zero(size):
    older = {name: tensor for name, tensor in unallocated(size).items() if name not in ONLY_IN_2_1}
    found = convert_state("x.pt", older)
    assert (found.family, found.network.size, found.network.policy) == ("SAM 2.0", size, "fifo")
    assert all(not found.state[name].any() for name in ONLY_IN_2_1)
    assert "zero" in found.notes[0]


def test_the_configurations_of_2_0_and_2_1_differ_in_what_the_zeros_stand_for_alone():
    for size in SIZES:
        newer, older = (OmegaConf.to_container(configuration(version, size)) for version in (".1", ""))
        assert {key: (older.get(key), newer.get(key)) for key in {*newer, *older} if older.get(key) != newer.get(key)} == {
            "no_obj_embed_spatial": (None, True),
            "add_tpos_enc_to_obj_ptrs": (False, True),
            "proj_tpos_enc_in_obj_ptrs": (None, True),
            "use_signed_tpos_enc_to_obj_ptrs": (None, True),
        }


def test_converted_sam2_0_does_what_sam2_0_does(monkeypatch):
    torch.manual_seed(0)
    as_in_2_0 = dict.fromkeys(
        ("no_obj_embed_spatial", "add_tpos_enc_to_obj_ptrs", "proj_tpos_enc_in_obj_ptrs", "use_signed_tpos_enc_to_obj_ptrs"), False
    )
    older = stock.SAM2VideoPredictor(**sam2_parts("tiny", PX) | as_in_2_0).eval()
    with torch.no_grad():
        older.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += 0.16  # present on some slices, absent on others
    found = convert_state("sam2_hiera_tiny.pt", older.state_dict())
    assert found.family == "SAM 2.0"
    ours = SlmSam2(found.network, PX).eval()
    ours.load_state_dict(found.state)
    frames = torch.rand(SLICES, 3, PX, PX, generator=torch.Generator().manual_seed(1))
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalised = (frames - mean) / deviation  # as the predictor's own loader does
    mask = torch.zeros(PX, PX, dtype=torch.bool)
    mask[12:40, 20:50] = True
    monkeypatch.setattr(stock, "load_video_frames", lambda **_: (normalised, PX, PX))
    state = older.init_state("unused")
    older.add_new_mask(state, START, 1, mask)
    for _ in older.propagate_in_video(state, start_frame_idx=START):
        pass
    expected = {t: out["pred_masks"][0, 0] for t, out in state["output_dict_per_obj"][0]["non_cond_frame_outputs"].items()}
    got = propagate(ours, frames, {1: [AnnotatedSlice(START, mask)]}, options=PropagationOptions(low_resolution_prompts=True))[1].logits
    assert sorted(expected) == list(range(START + 1, SLICES))
    assert {bool(logits.max() > ABSENT) for logits in expected.values()} == {True, False}
    for t, logits in expected.items():
        assert (got[t] - logits.clamp(min=ABSENT)).abs().max() <= 1e-4


@pytest.mark.parametrize(("scale", "layers"), [("gamma", "layers."), ("weight", "layers."), ("gamma", "")])
def test_a_fine_tuned_slm_sam_2_is_converted_to_shortlong_with_the_sum_fuser(scale, layers):
    model = build(policy="shortlong", fuser="sum")
    found = convert_state("x.pt", as_the_authors_name_them(model.state_dict(), scale, layers))
    assert (found.family, found.network.policy, found.network.fuser) == ("SLM-SAM 2", "shortlong", "sum")
    assert found.notes == ("rec_maskmem_tpos_enc left out: the model does not use it",)
    wanted = model.state_dict()
    assert set(found.state) == set(wanted)
    assert all(torch.equal(found.state[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("size", SIZES)
def test_a_fine_tuned_slm_sam_2_is_recognised_at_every_size(size):
    found = convert_state("x.pt", as_the_authors_name_them(unallocated(size, policy="shortlong", fuser="sum")))
    assert (found.family, found.network.size) == ("SLM-SAM 2", size)


def test_tensors_of_slmsam2_without_a_header_keep_the_gated_fuser():
    found = convert_state("x.pt", unallocated("nano", policy="shortlong"))
    assert (found.family, found.network.fuser) == ("slmsam2", "gated")


# Rejected weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("no_mem_embed"), "missing: no_mem_embed"),
        (lambda s: s.pop("no_obj_embed_spatial"), "missing: no_obj_embed_spatial"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda s: s.update(no_mem_embed=torch.zeros(1, 1, 3)), r"of another shape: no_mem_embed \[1, 1, 3\] for \[1, 1, 256\]"),
        (lambda s: [s.pop(name) for name in list(s) if name.startswith("memory_encoder.")], r"missing: memory_encoder\..* and \d+ more"),
        (lambda s: [s.pop(name) for name in list(s) if name.startswith("memory_attention.")], "unsupported checkpoint"),
        (lambda s: [s.pop(name) for name in list(s) if ".blocks.11." in name], "unsupported size: 96 channels and 11 blocks"),
        (lambda s: [s.pop(name) for name in (*ONLY_IN_2_1, "maskmem_tpos_enc")], "maskmem_tpos_enc or no_mem_embed is missing"),
        (
            lambda s: s.update({"recent_memory_attention.norm.weight": torch.zeros(256)}),
            "recognised as SLM-SAM 2 tiny, but not complete: missing",
        ),
    ],
)
def test_an_incomplete_state_is_rejected_with_the_names_of_tensors(change, message):
    state = unallocated("tiny")
    change(state)
    with pytest.raises(WeightsError, match=message):
        convert_state("x.pt", state)


@pytest.mark.parametrize("state", [{"a": torch.zeros(1)}, {"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(3)}])
def test_other_networks_are_rejected_as_unsupported(state):
    with pytest.raises(WeightsError, match=r"x\.pt: unsupported checkpoint"):
        convert_state("x.pt", state)


def test_shape_mismatch_lists_missing_unexpected_and_misshapen_tensors():
    wanted = {"a": torch.Size([1]), "b": torch.Size([2])}
    assert (
        shape_mismatch(wanted, {"b": torch.zeros(3), "c": torch.zeros(1)}) == "missing: a; unexpected: c; of another shape: b [3] for [2]"
    )
    assert shape_mismatch(wanted, {"a": torch.zeros(1), "b": torch.zeros(2)}) == ""


# Files


class Boom:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def torch_zip(payload, compression=zipfile.ZIP_STORED, **members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


@pytest.mark.parametrize("wrap", [lambda p: p, torch_zip], ids=["bare", "zip"])
@pytest.mark.parametrize("where", [lambda boom: boom, lambda boom: {"model": {"w": boom}}, lambda boom: {"model": {}, "epoch": boom}])
def test_code_inside_a_pickle_is_never_run(tmp_path, wrap, where):
    marker, path = tmp_path / "PWNED", tmp_path / "model.pt"
    path.write_bytes(wrap(pickle.dumps(where(Boom(str(marker))), 2)))
    with pytest.raises(WeightsError, match="unsafe|safely"):
        read_pt(path)
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_rejected(tmp_path, keep):
    torch.save({"model": {"a": torch.zeros(1000)}}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(WeightsError, match="corrupt or truncated"):
        read_pt(tmp_path / "cut.pt")


def test_a_zip_bomb_is_rejected_before_it_is_unpacked(tmp_path):
    (tmp_path / "bomb.pt").write_bytes(torch_zip(bytes(50 * 2**20), zipfile.ZIP_DEFLATED))
    with pytest.raises(WeightsError, match="compressed or too large"):
        read_pt(tmp_path / "bomb.pt")


def test_a_tensor_larger_than_the_file_is_rejected(tmp_path):
    torch.save({"model": {"a": torch.zeros(1).expand(10**12)}}, tmp_path / "stretched.pt")
    with pytest.raises(WeightsError, match="claim to be larger than the file"):
        read_pt(tmp_path / "stretched.pt")


@pytest.mark.parametrize("odd", [torch.zeros(2, 2).to_sparse(), torch.zeros(3, device="meta")])
def test_sparse_and_meta_tensors_are_rejected(tmp_path, odd):
    torch.save({"model": {"a": odd}}, tmp_path / "odd.pt")
    with pytest.raises(WeightsError, match="sparse, quantised or empty|safely"):
        read_pt(tmp_path / "odd.pt")


def test_other_entries_of_a_training_checkpoint_are_ignored(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "training.pt")
    assert torch.equal(read_pt(tmp_path / "training.pt")["a"], torch.ones(2))
