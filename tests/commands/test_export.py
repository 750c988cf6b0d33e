"""Exporting and importing models: an imported model is the exported one, and no file of the user is lost."""

import io
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from slmsam2_cli.commands.export import export_model, import_model
from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.errors import OutputError, UsageError, WeightsError
from slmsam2_cli.model.checkpoint import read_checkpoint
from slmsam2_cli.workspace import Workspace


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom_dataset(folder, cases=2, test_cases=0, seed=5, shape=(8, 40, 40))
    finetune(folder, Workspace(folder / "slmsam2"), cases=1, weights="random", steps=1)
    return folder


@pytest.fixture(scope="module")
def archive(dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "model.zip"
    assert export_model(Workspace(dataset / "slmsam2"), None, path) == 0
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_an_imported_model_predicts_like_the_one_that_was_exported(archive, dataset, tmp_path):
    folder = tmp_path / "model"
    assert import_model(archive, folder) == 0
    ours = Workspace(dataset / "slmsam2").model
    assert (folder / "model.safetensors").read_bytes() == ours.read_bytes()
    image = sorted((dataset / "imagesTr").iterdir())[0]
    for model, masks in ((folder, "theirs"), (ours, "ours")):
        assert predict(image, tmp_path / masks, simulate_from=dataset / "labelsTr", model=model, report=False) == 0
    one, two = (np.asarray(nibabel.load(tmp_path / masks / image.name).dataobj) for masks in ("theirs", "ours"))
    assert np.array_equal(one, two)


def test_an_imported_model_has_exactly_these_files_and_no_path_of_this_computer(archive, tmp_path):
    import_model(archive, tmp_path / "model")
    files = files_in(tmp_path / "model")
    assert set(files) == {"model.safetensors", "about.json", "plan.json", "provenance.json", "LICENSE.txt", "README.txt"}
    assert not any(str(tmp_path.parent).encode() in content for content in files.values())


def test_exporting_twice_changes_nothing_and_another_file_is_replaced_only_with_overwrite(archive, dataset, tmp_path, capsys):
    path = tmp_path / "again.zip"
    export_model(None, Workspace(dataset / "slmsam2").finetuned, path)
    assert path.read_bytes() == archive.read_bytes()
    before = path.stat().st_mtime_ns
    export_model(Workspace(dataset / "slmsam2"), None, path)
    assert path.stat().st_mtime_ns == before and "already there" in capsys.readouterr().err
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="--overwrite"):
        export_model(Workspace(dataset / "slmsam2"), None, path)
    assert path.read_bytes() == b"mine"
    export_model(Workspace(dataset / "slmsam2"), None, path, overwrite=True)
    assert path.read_bytes() == archive.read_bytes()


def test_importing_replaces_files_only_with_overwrite(archive, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "plan.json").write_text("mine")
    with pytest.raises(OutputError, match="plan.json: another file of this name exists"):
        import_model(archive, folder)
    assert files_in(folder) == {"notes.txt": b"mine", "plan.json": b"mine"}
    import_model(archive, folder, overwrite=True)
    assert files_in(folder)["notes.txt"] == b"mine" and len(files_in(folder)) == 7
    import_model(archive, folder)


def test_a_link_in_the_folder_is_not_followed(archive, tmp_path):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(OutputError, match="another file of this name exists"):
        import_model(archive, folder)
    assert not outside.exists()


def test_a_zip_with_a_path_outside_its_folder_is_rejected_and_nothing_is_written(archive, tmp_path):
    memory = io.BytesIO(archive.read_bytes())
    with zipfile.ZipFile(memory, "a") as changed:
        changed.writestr("../outside.txt", b"x")
    bad = tmp_path / "bad.zip"
    bad.write_bytes(memory.getvalue())
    with pytest.raises(WeightsError, match="unexpected file"):
        import_model(bad, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.zip"]


def test_a_truncated_model_is_rejected_although_every_digest_matches(archive, tmp_path):
    import hashlib

    with zipfile.ZipFile(archive) as whole:
        files = {name: whole.read(name) for name in whole.namelist() if name != "SHA256SUMS"}
    files["model.safetensors"] = files["model.safetensors"][:-1000]
    files["SHA256SUMS"] = "".join(f"{hashlib.sha256(c).hexdigest()}  {n}\n" for n, c in files.items()).encode()
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w") as changed:
        for name, content in files.items():
            changed.writestr(name, content)
    with pytest.raises(WeightsError, match="bad.zip: does not hold a valid model: corrupt or truncated"):
        import_model(bad, tmp_path / "model")
    assert files_in(tmp_path / "model") == {}


def test_the_folder_is_named_after_the_zip_by_default(archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import_model(archive, None)
    assert read_checkpoint(tmp_path / "model" / "model.safetensors").plan is not None


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (lambda folder: export_model(None, None, folder / "a.zip"), UsageError, "no model to export"),
        (lambda folder: export_model(Workspace(folder), None, folder / "a.zip"), UsageError, "no fine-tuned model"),
        (lambda folder: export_model(None, folder / "model.safetensors", folder / "a.tar"), UsageError, r"must end in \.zip"),
        (lambda folder: export_model(None, folder / "absent.safetensors", folder / "a.zip"), WeightsError, "no such file"),
        (lambda folder: import_model(folder / "absent.zip", None), UsageError, "not found"),
        (lambda folder: import_model(folder, None), UsageError, "a directory"),
    ],
)
def test_an_invalid_request_is_rejected_with_the_reason(options, error, match, tmp_path):
    with pytest.raises(error, match=match):
        options(tmp_path)
