"""slmsam2 weights: downloading, listing, verifying and importing, against a server on this computer."""

from __future__ import annotations

import ast
import errno
import hashlib
import io
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from weights_server import Site, served

import slmsam2_cli
from slmsam2_cli import console
from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.weights import get, import_weights, list_weights, verify
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.errors import LockError, OutputError, UsageError, WeightsError
from slmsam2_cli.io import atomic, download
from slmsam2_cli.io.download import DigestError, DownloadError
from slmsam2_cli.model import zoo
from slmsam2_cli.model.checkpoint import Checkpoint, Header, Provenance, load_base_weights, load_weights, read_checkpoint, save_weights
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.model.zoo import Entry
from slmsam2_cli.planning.plan import NetworkPlan
from slmsam2_cli.workspace import Workspace

PX = 32


def build(seed: int = 0, **network: Any) -> SlmSam2:
    torch.manual_seed(seed)
    return SlmSam2(NetworkPlan.model_validate({"size": "nano", **network}), PX)


def pt_of(state: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return build(policy="fifo").state_dict()


@pytest.fixture(scope="module")
def content(base: dict[str, torch.Tensor]) -> bytes:
    return pt_of(base)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo, "BUNDLED_WEIGHTS", tmp_path / "absent.safetensors")
    monkeypatch.setattr("slmsam2_cli.model.checkpoint.BUNDLED_WEIGHTS", tmp_path / "absent.safetensors")
    return zoo.folder()


@pytest.fixture
def site(content: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server with two published weights: `known` with a digest, `unknown` without, of a licence that says something."""
    monkeypatch.setattr(download, "PAUSES_S", (0.0,))
    monkeypatch.setenv("no_proxy", "*")
    with served({"/known.pt": content, "/unknown.pt": content}) as running:
        digest = hashlib.sha256(content).hexdigest()
        known = Entry("known", "nano", "SAM 2.1", f"{running.url}/known.pt", len(content), digest, "a test")
        unknown = Entry("unknown", "nano", "SAM 2.1", f"{running.url}/unknown.pt", None, None, "", "CC-BY-SA-4.0", "for research")
        monkeypatch.setattr(zoo, "ENTRIES", (known, unknown))
        yield running


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr()
    return found.out + found.err


# get


def test_downloaded_weights_are_found_by_name(
    site: Site, cache: Path, base: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert get("known") == 0
    text = printed(capsys)
    assert "its SHA-256 is the published one" in text and "licence: Apache-2.0" in text and "--weights known" in text
    read = load_base_weights("known")
    assert read is not None and read.provenance is not None and read.network is not None
    assert (read.name, read.provenance.pretrained, read.provenance.licence, read.network.policy) == ("known", "known", "Apache-2.0", "fifo")
    assert all(torch.equal(read.state[name], tensor) for name, tensor in base.items())
    load_weights(build(seed=1), read)


def test_a_second_get_opens_no_connection(site: Site, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get("known")
    site.requests.clear()
    assert get("known") == 0
    assert "here already" in printed(capsys) and site.requests == []


def test_a_changed_file_is_downloaded_again(site: Site, cache: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    get("known")
    (cache / "known.pt").write_bytes(b"changed")
    with pytest.raises(WeightsError, match="corrupt or changed"):
        load_base_weights("known")
    assert get("known") == 0
    assert (cache / "known.pt").read_bytes() == content
    assert "downloading it again" in printed(capsys)


def test_a_file_is_downloaded_into_the_output_folder(site: Site, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert get("known", output=tmp_path / "there") == 0
    assert (tmp_path / "there" / "known.pt").exists() and zoo.installed_path("known") is None
    assert f"--weights {tmp_path / 'there' / 'known.pt'}" in printed(capsys)


def test_without_a_published_hash_the_digest_of_the_download_is_printed_and_recorded(
    site: Site, cache: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert get("unknown") == 0
    digest = hashlib.sha256(content).hexdigest()
    text = printed(capsys)
    assert f"no published hash is known for this file; its digest after download is {digest}; pin it with --sha256" in text
    assert "licence: CC-BY-SA-4.0 (for research)" in text
    (cache / "unknown.pt").write_bytes(content[:-1] + b"x")
    with pytest.raises(WeightsError, match="corrupt or changed"):
        load_base_weights("unknown")


def test_a_digest_given_by_the_user_is_checked(site: Site, cache: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DigestError, match="refused"):
        get("unknown", sha256="0" * 64)
    assert zoo.installed_path("unknown") is None
    assert get("unknown", sha256="SHA256:" + hashlib.sha256(content).hexdigest().upper()) == 0
    assert "no published hash" not in printed(capsys)


@pytest.mark.parametrize("sha256", ["", "abc", "g" * 64])
def test_an_invalid_digest_is_rejected(site: Site, cache: Path, sha256: str) -> None:
    with pytest.raises(UsageError, match="not a SHA-256"):
        get("unknown", sha256=sha256)


def test_a_digest_other_than_the_published_one_is_rejected(site: Site, cache: Path) -> None:
    with pytest.raises(UsageError, match="not the digest published for known"):
        get("known", sha256="0" * 64)


def test_a_mirror_must_provide_the_published_file(site: Site, cache: Path, content: bytes) -> None:
    site.files |= {"/mirror.pt": content, "/forged.pt": content[:-1] + b"x"}
    with pytest.raises(DigestError, match="refused"):
        get("known", url=f"{site.url}/forged.pt")
    assert zoo.installed_path("known") is None
    assert get("known", url=f"{site.url}/mirror.pt") == 0


def test_an_unknown_name_is_answered_with_the_known_ones(site: Site, cache: Path) -> None:
    with pytest.raises(UsageError, match="sam3: no published weights of that name. Known are known, unknown"):
        get("sam3")


@pytest.mark.parametrize("code", [404, 500])
def test_a_failed_download_names_the_way_to_do_it_by_hand(site: Site, cache: Path, code: int) -> None:
    site.errors = [code] * 9
    with pytest.raises(
        DownloadError, match=rf"HTTP {code}.* Or download http.*/known.pt on any computer, and run slmsam2 weights import FILE --name known"
    ):
        get("known")


def test_without_a_network_the_error_names_the_way_to_do_it_by_hand(site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_knows(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody_knows)
    with pytest.raises(DownloadError, match=r"no such host, or no network\. .* slmsam2 weights import FILE --name known"):
        get("known", url="https://no.such.host.invalid/known.pt")


def test_an_interrupted_get_resumes(site: Site, cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def interrupted(*_: object) -> Iterator[Callable[..., None]]:
        def advance(*_: object) -> None:
            raise KeyboardInterrupt

        yield advance

    site.cut_at = [100_000]
    with monkeypatch.context() as patched:
        patched.setattr(console, "progress", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get("known")
    assert zoo.installed_path("known") is None
    assert get("known") == 0
    assert site.requests[-1] == ("/known.pt", "bytes=100000-")
    assert (cache / "known.pt").read_bytes() == content


def test_a_full_disk_is_an_error_of_one_line(site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "open_partial", full)
    with pytest.raises(OutputError, match="no space left on the device") as caught:
        get("known")
    assert "\n" not in str(caught.value)


def test_two_gets_of_the_same_weights_exclude_each_other_and_others_do_not(site: Site, cache: Path) -> None:
    with atomic.lock_folder(cache, "known"):
        with pytest.raises(LockError):
            get("known")
        assert get("unknown") == 0


def test_progress_is_in_megabytes_and_plain_away_from_a_terminal(
    site: Site, cache: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    get("known")
    text = printed(capsys)
    megabytes = -(-len(content) // 1_000_000)
    assert f"known, MB: {megabytes}/{megabytes}" in text
    assert text.replace("\n", "").isprintable()


# list


def test_the_list_shows_which_weights_are_in_the_cache(
    site: Site, cache: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    get("known")
    get("unknown")
    (tmp_path / "knee.pt").write_bytes(content + b"")
    import_weights(tmp_path / "knee.pt", name="knee")
    printed(capsys)
    assert list_weights() == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[2:]}
    assert "yes   when downloaded" in rows["known"]
    assert "yes   no published hash" in rows["unknown"] and "CC-BY-SA-4.0" in rows["unknown"]
    assert "yes   when imported" in rows["knee"] and "imported from known" in rows["knee"] and "nano" in rows["knee"]


def test_the_list_works_without_a_cache_and_creates_none(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list_weights() == 0
    out = capsys.readouterr().out
    assert "sam2.1-tiny               156.0  tiny       Apache-2.0    no" in out and "medsam2" in out
    assert not cache.exists()


def test_the_bundled_model_is_listed_when_there_is_one(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cache.parent / "nano.safetensors"
    model = build()
    save_weights(path, dict(model.state_dict()), Header(model.network, Provenance(pretrained="here", licence="Apache-2.0")))
    monkeypatch.setattr(zoo, "BUNDLED_WEIGHTS", path)
    list_weights()
    assert "--weights auto" in capsys.readouterr().out
    assert load_base_weights("nano") is not None
    assert verify("nano") == 0


def test_a_damaged_file_is_still_listed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.mkdir(parents=True)
    (cache / "broken.safetensors").write_bytes(b"no header")
    assert list_weights() == 0
    assert "broken" in capsys.readouterr().out


# verify


def test_verify_shows_digest_layout_and_tensors(site: Site, cache: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    get("known")
    assert verify("known") == 0
    out = capsys.readouterr().out
    assert hashlib.sha256(content).hexdigest() in out and "SAM 2.1" in out and "436" in out and "the published one" in out


def test_verify_of_all_continues_after_an_invalid_one(site: Site, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get("known")
    get("unknown")
    (cache / "known.pt").write_bytes(b"bad")
    assert verify(None) == 1
    found = capsys.readouterr()
    assert "error: known.pt: corrupt or changed" in found.err and "unknown" in found.out


def test_verify_of_an_empty_cache_names_the_next_command(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(None) == 0
    assert "slmsam2 weights list" in printed(capsys)


def test_verify_recognises_a_published_file_under_any_name(
    site: Site, cache: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "renamed.pt").write_bytes(content)
    assert verify(str(tmp_path / "renamed.pt")) == 0
    assert "the published one" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["sam3", "absent.pt", "known"])
def test_verify_of_absent_weights_is_an_error(site: Site, cache: Path, target: str) -> None:
    with pytest.raises(WeightsError):
        verify(target)


def test_verify_of_a_folder_is_an_error(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="a directory, not a file"):
        verify(str(tmp_path))


# import


def test_a_published_file_downloaded_by_hand_is_imported_under_its_name(
    site: Site, cache: Path, tmp_path: Path, content: bytes, base: dict[str, torch.Tensor]
) -> None:
    (tmp_path / "download (1).pt").write_bytes(content)
    assert import_weights(tmp_path / "download (1).pt") == 0
    read = load_base_weights("known")
    assert read is not None and read.provenance is not None
    assert (read.provenance.pretrained, read.provenance.pretrained_digest) == ("known", hashlib.sha256(content).hexdigest())
    assert read.provenance.licence == "Apache-2.0"
    assert all(torch.equal(read.state[name], tensor) for name, tensor in base.items())
    assert verify("known") == 0


def test_imported_weights_record_their_source(cache: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my knee.pt").write_bytes(content)
    assert import_weights(tmp_path / "my knee.pt") == 0
    text = printed(capsys)
    assert "--weights my-knee" in text and "the licence of these weights is not known" in text
    read = load_base_weights("my-knee")
    assert read is not None and read.provenance is not None
    assert (read.provenance.pretrained, read.provenance.licence) == ("my knee.pt", "")
    assert read.provenance.pretrained_digest == hashlib.sha256(content).hexdigest()


def test_a_fine_tuned_slm_sam2_is_imported_and_unused_tensors_are_named(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(fuser="sum")
    renamed = {
        name.replace("short_memory_attention.", "recent_memory_attention.").replace(
            "stream_fuser.blocks.", "recent_memory_fuser.layers."
        ): tensor
        for name, tensor in model.state_dict().items()
    }
    (tmp_path / "slm.pt").write_bytes(pt_of(renamed | {"rec_maskmem_tpos_enc": torch.zeros(7, 1, 1, 32)}))
    assert import_weights(tmp_path / "slm.pt") == 0
    assert "rec_maskmem_tpos_enc left out" in printed(capsys)
    read = load_base_weights("slm")
    assert read is not None and read.network is not None
    assert (read.network.policy, read.network.fuser) == ("shortlong", "sum")
    load_weights(build(seed=1, fuser="sum"), read)
    with pytest.raises(WeightsError, match=r"missing: stream_fuser.gate.* in plan.json to those of the weights \(shortlong, sum\)"):
        load_weights(build(fuser="gated"), read)


def test_an_imported_model_of_this_tool_keeps_its_provenance(cache: Path, tmp_path: Path) -> None:
    model = build()
    path = tmp_path / "model.safetensors"
    given = Provenance(pretrained="random", random=True, training=("a",))
    save_weights(path, dict(model.state_dict()), Header(model.network, given))
    assert import_weights(path, name="prostate") == 0
    read = load_base_weights("prostate")
    assert read is not None
    assert (read.provenance, read.digest, read.network) == (given, read_checkpoint(path).digest, model.network)


def test_weights_of_the_same_name_are_replaced_only_with_overwrite(cache: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "knee.pt").write_bytes(content)
    import_weights(tmp_path / "knee.pt")
    before = (cache / "knee.safetensors").read_bytes()
    (tmp_path / "knee.pt").write_bytes(pt_of(build(seed=5, policy="fifo").state_dict()))
    with pytest.raises(UsageError, match="here already. Choose another --name, or add --overwrite"):
        import_weights(tmp_path / "knee.pt")
    assert (cache / "knee.safetensors").read_bytes() == before
    assert import_weights(tmp_path / "knee.pt", overwrite=True) == 0
    assert (cache / "knee.safetensors").read_bytes() != before


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "auto", "random", "nano", "a b", "x" * 101])
def test_an_invalid_name_is_rejected(cache: Path, tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / "knee.pt").write_bytes(content)
    with pytest.raises(UsageError, match="not a name for weights"):
        import_weights(tmp_path / "knee.pt", name=name)


def test_a_published_name_is_reserved_for_the_published_file(site: Site, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "other.pt").write_bytes(pt_of(build(seed=5, policy="fifo").state_dict()))
    with pytest.raises(UsageError, match="known is the name of published weights, and other.pt is another file"):
        import_weights(tmp_path / "other.pt", name="known")


def assert_rejected(cache: Path, path: Path, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        import_weights(path)
    assert zoo.imported() == []


def test_incomplete_or_damaged_weights_are_rejected_and_nothing_is_written(
    cache: Path, tmp_path: Path, base: dict[str, torch.Tensor], content: bytes
) -> None:
    path = tmp_path / "knee.pt"
    assert_rejected(cache, tmp_path / "absent.pt", "not found")
    for state, message in (
        ({name: tensor for name, tensor in base.items() if name != "no_mem_embed"}, "missing: no_mem_embed"),
        (base | {"extra": torch.zeros(1)}, "unexpected: extra"),
        (base | {"no_mem_embed": torch.zeros(3)}, "of another shape: no_mem_embed"),
        (base | {"no_mem_embed": torch.full_like(base["no_mem_embed"], float("nan"))}, "not finite, in no_mem_embed"),
        ({"resnet.weight": torch.zeros(3)}, "unsupported checkpoint"),
    ):
        path.write_bytes(pt_of(state))
        assert_rejected(cache, path, message)
    path.write_bytes(content[:-1000])
    assert_rejected(cache, path, "corrupt or truncated")
    path.write_bytes(b"<html>404</html>")
    assert_rejected(cache, path, "not a checkpoint")


def test_tensors_that_share_memory_or_are_of_half_precision_are_imported(
    cache: Path, tmp_path: Path, base: dict[str, torch.Tensor]
) -> None:
    halves = {name: tensor.half() for name, tensor in base.items()}
    duplicates = [name for name in halves if name.endswith("norm1.bias")][:2]
    if halves[duplicates[0]].shape == halves[duplicates[1]].shape:
        halves[duplicates[1]] = halves[duplicates[0]]
    (tmp_path / "half.pt").write_bytes(pt_of(halves))
    assert import_weights(tmp_path / "half.pt") == 0
    read = load_base_weights("half")
    assert read is not None and {tensor.dtype for tensor in read.state.values()} == {torch.float32}


# --weights NAME, and the network


def test_absent_weights_are_answered_with_the_command_that_downloads_them(cache: Path) -> None:
    with pytest.raises(WeightsError, match="slmsam2 weights get sam2.1-tiny"):
        load_base_weights("sam2.1-tiny")
    with pytest.raises(WeightsError, match="slmsam2 weights get sam2.1-tiny"):
        load_base_weights("auto")


def test_weights_of_another_network_size_are_answered_with_the_plan_command(cache: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "knee.pt").write_bytes(content)
    import_weights(tmp_path / "knee.pt")
    read = load_base_weights("knee")
    assert read is not None
    with pytest.raises(WeightsError, match=r"tiny \(fifo\): its network is nano\. Run slmsam2 plan --network nano --overwrite"):
        load_weights(build(size="tiny", policy="fifo"), read)


def test_finetune_starts_from_named_weights_and_records_their_licence(site: Site, cache: Path, tmp_path: Path) -> None:
    write_phantom_dataset(tmp_path / "data", cases=2, test_cases=0, shape=(4, 32, 32))
    space = Workspace.of(tmp_path / "data", None)
    get("unknown")
    assert finetune(tmp_path / "data", space, cases=1, weights="unknown", steps=1, device="cpu") == 0
    read = read_checkpoint(space.model)
    assert read.provenance is not None and read.network is not None
    assert (read.provenance.pretrained, read.provenance.licence, read.network.size) == ("unknown", "CC-BY-SA-4.0", "nano")
    assert atomic.read_json(space.split, "the split")["options"]["weights"] == "unknown"


def test_finetune_without_a_plan_plans_for_the_network_of_the_weights(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_phantom_dataset(tmp_path / "data", cases=2, test_cases=0, shape=(4, 32, 32))
    space = Workspace.of(tmp_path / "data", None)
    empty = Checkpoint("x", {}, "", NetworkPlan.model_validate({"size": "tiny"}))
    monkeypatch.setattr("slmsam2_cli.commands.finetune.load_base_weights", lambda _: empty)
    with pytest.raises(WeightsError, match="missing"):
        finetune(tmp_path / "data", space, cases=1, weights="x", device="cpu")
    assert atomic.read_json(space.plan, "plan")["network"]["size"] == "tiny"


def test_only_weights_get_can_open_a_connection() -> None:
    """Modules that open connections are imported by io/download.py, and that by commands/weights.py, alone."""
    package = Path(slmsam2_cli.__file__).parent
    networked = {
        "urllib.request",
        "http.client",
        "http",
        "socket",
        "ssl",
        "ftplib",
        "smtplib",
        "requests",
        "urllib3",
        "httpx",
        "huggingface_hub",
    }
    users: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                if name in networked or name == "slmsam2_cli.io.download":
                    users.setdefault(path.relative_to(package).as_posix(), set()).add(name)
    assert set(users) == {"io/download.py", "commands/weights.py"}
    assert users["commands/weights.py"] == {"slmsam2_cli.io.download"}


def test_import_list_and_verify_open_no_connection(cache: Path, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)
    (tmp_path / "knee.pt").write_bytes(content)
    assert (import_weights(tmp_path / "knee.pt"), list_weights(), verify(None), verify("knee")) == (0, 0, 0, 0)
    assert load_base_weights("knee") is not None


def test_quiet_prints_only_warnings(site: Site, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.settings.quiet = True
    get("known")
    assert printed(capsys) == ""
    get("unknown")
    assert printed(capsys).startswith("warning: no published hash")
