"""The command line: what it says, what it passes on, and the exit code of everything that may happen."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import slmsam2_cli
from slmsam2_cli import console
from slmsam2_cli.cli.app import ALIASES, app, translate_aliases
from slmsam2_cli.cli.exit_codes import Terminated, run_for_exit_code
from slmsam2_cli.errors import CaseError, DatasetError, PlanError, UsageError
from slmsam2_cli.version import VERSION
from slmsam2_cli.workspace import Workspace

COMMANDS = ("plan", "preprocess", "finetune", "predict", "evaluate", "demo", "export-model", "import-model", "pretrain", "weights")
WEIGHTS = ("weights list", "weights get", "weights verify", "weights import")
HEAVY = ("torch", "sam2", "SimpleITK", "nibabel", "scipy", "pandas", "numpy")
ROOT = Path(slmsam2_cli.__file__).parents[1]


def run(*arguments: str) -> int:
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as stopped:
        app(args=translate_aliases(arguments), prog_name="slmsam2")
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def in_a_process(source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python running a few lines with this package at hand."""
    command = [sys.executable, "-c", source, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)


@pytest.fixture
def passed_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Replace a stage by one that remembers its arguments, bound to the real signature."""

    def replace(name: str) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        module = import_module("slmsam2_cli.commands.demo" if name == "demo" else f"slmsam2_cli.commands.{name}")
        signature = inspect.signature(getattr(module, name))

        def stage(*args: Any, **kwargs: Any) -> int:
            seen.update(signature.bind(*args, **kwargs).arguments)
            return 0

        monkeypatch.setattr(module, name, stage)
        return seen

    return replace


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is a data set."""
    (tmp_path / "dataset.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


# What it says


def test_help_imports_no_slow_library() -> None:
    source = f"""
import sys
from slmsam2_cli.cli import app
sys.argv = ["slmsam2", *sys.argv[1:]]
try:
    app.main()
except SystemExit:
    print([name for name in {HEAVY} if name in sys.modules])
"""
    for arguments in (["--help"], ["predict", "--help"], ["weights", "get", "--help"], ["--version"]):
        assert in_a_process(source, *arguments).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", [*COMMANDS, *WEIGHTS])
def test_every_commands_help_shows_an_example_of_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command.split(), "--help") == 0
    _, _, examples = capsys.readouterr().out.partition("Examples:")
    assert f"slmsam2 {command}" in examples


def test_help_lists_the_commands_in_the_order_of_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    listed = capsys.readouterr().out.partition("Commands:")[2].splitlines()
    assert [line.split()[0] for line in listed if line.startswith("  ") and line.split()][: len(COMMANDS)] == list(COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS, *WEIGHTS])
def test_help_has_no_cut_sentence_and_no_control_character(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(*command.split(), "--help")
    text = capsys.readouterr().out
    assert "..." not in text.replace("COMMAND [ARGS]...", "")
    assert text.replace("\n", "").isprintable()


def test_the_version_is_printed_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr() == (f"slmsam2 {VERSION}\n", "")


# What it passes on


def test_the_data_set_is_the_current_folder_if_it_is_one(dataset: Path, passed_on: Callable[[str], dict[str, Any]]) -> None:
    seen = passed_on("plan")
    assert run("plan") == 0
    assert seen["dataset"].resolve() == dataset.resolve()
    assert seen["workspace"].root.resolve() == dataset.resolve() / "slmsam2"


def test_a_workspace_may_be_anywhere(dataset: Path, passed_on: Callable[[str], dict[str, Any]]) -> None:
    seen = passed_on("preprocess")
    assert run("preprocess", "-w", "elsewhere", "--overwrite") == 0
    assert seen["workspace"] == Workspace(Path("elsewhere"))
    assert seen["overwrite"] is True


def test_finetune_learns_from_five_cases_unless_told_otherwise(dataset: Path, passed_on: Callable[[str], dict[str, Any]]) -> None:
    seen = passed_on("finetune")
    assert run("finetune") == 0
    assert (seen["cases"], seen["weights"], seen["minutes"], seen["steps"], seen["seed"], seen["resume"]) == (
        5,
        "auto",
        None,
        None,
        0,
        False,
    )
    assert run("finetune", "-n", "2", "--weights", "random", "--minutes", "1.5", "--seed", "7", "--continue", "--device", "cpu") == 0
    assert (seen["cases"], seen["weights"], seen["minutes"], seen["seed"], seen["resume"], seen["device"]) == (
        2,
        "random",
        1.5,
        7,
        True,
        "cpu",
    )


def test_predict_takes_folders_outside_any_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed_on: Callable[[str], dict[str, Any]]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = passed_on("predict")
    assert run("predict", "-i", "scans", "-o", "masks", "-p", "prompts", "--model", "m.safetensors") == 0
    assert (seen["images"], seen["output"], seen["prompts"], seen["model"]) == (
        Path("scans"),
        Path("masks"),
        Path("prompts"),
        Path("m.safetensors"),
    )
    assert (seen["dataset"], seen["workspace"], seen["prompt_slice"], seen["overwrite"]) == (None, None, "middle", False)


def test_predict_without_images_takes_the_data_sets_own(dataset: Path, passed_on: Callable[[str], dict[str, Any]]) -> None:
    seen = passed_on("predict")
    assert run("predict", "--prompt-slice", "largest") == 0
    assert (seen["images"], seen["output"], seen["prompt_slice"], seen["dataset"]) == (None, None, "largest", Path())


def test_evaluate_of_two_folders_ignores_the_data_set_around(dataset: Path, passed_on: Callable[[str], dict[str, Any]]) -> None:
    seen = passed_on("evaluate")
    assert run("evaluate", "-p", "masks", "-g", "labels", "--json", "--fail-under", "Dice=0.8") == 0
    assert (seen["dataset"], seen["workspace"], seen["as_json"], seen["fail_under"]) == (None, None, True, ["Dice=0.8"])
    assert run("evaluate") == 0
    assert seen["dataset"] == Path()


def test_demo_writes_to_the_folder_of_the_output_option(passed_on: Callable[[str], dict[str, Any]]) -> None:
    seen = passed_on("demo")
    assert run("demo", "-o", "there") == 0
    assert seen["folder"] == Path("there")


def test_weights_pass_on_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = import_module("slmsam2_cli.commands.weights")
    seen: list[tuple[object, ...]] = []

    def note(name: str) -> Callable[..., int]:
        signature = inspect.signature(getattr(stage, name))
        return lambda *args, **kwargs: seen.append((name, *signature.bind(*args, **kwargs).arguments.values())) or 0

    for name in ("list_weights", "get", "verify", "import_weights"):
        monkeypatch.setattr(stage, name, note(name))
    assert run("weights", "list") == 0
    assert run("weights", "get", "medsam2", "--output", "there", "--sha256", "0a", "--url", "http://mirror/a.pt") == 0
    assert run("weights", "verify") == run("weights", "verify", "a.pt") == 0
    assert run("weights", "import", "a.pt", "--name", "knee", "--overwrite") == 0
    assert seen == [
        ("list_weights",),
        ("get", "medsam2", Path("there"), "0a", "http://mirror/a.pt"),
        ("verify", None),
        ("verify", "a.pt"),
        ("import_weights", Path("a.pt"), "knee", True),
    ]


def test_weights_of_no_known_name_are_exit_2_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("weights", "get", "sam3") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: sam3: no published weights of that name. Known are sam2.1-tiny, ") and error.count("\n") == 1
    assert run("weights", "get") == 2


def test_nnunets_spellings_are_understood(tmp_path: Path, passed_on: Callable[[str], dict[str, Any]]) -> None:
    seen = passed_on("predict")
    assert run("predict", "-i", "a", "-o", "b", "-num_parts", "4", "-part_id", "3", "-device", "cpu", "-chk=m.safetensors", "--c") == 0
    assert (seen["num_parts"], seen["part_id"], seen["device"], seen["model"]) == (4, 3, "cpu", Path("m.safetensors"))


@pytest.mark.parametrize(("options", "overwrite"), [((), False), (("--continue",), False), (("--overwrite",), True)])
def test_predict_resumes_or_overwrites(
    options: tuple[str, ...], overwrite: bool, dataset: Path, passed_on: Callable[[str], dict[str, Any]]
) -> None:
    seen = passed_on("predict")
    assert run("predict", *options) == 0
    assert seen["overwrite"] is overwrite


def test_continue_and_overwrite_cannot_be_combined(
    dataset: Path, passed_on: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = passed_on("predict")
    assert run("predict", "--overwrite", "--continue") == 2
    assert "cannot be combined" in capsys.readouterr().err
    assert seen == {}


def test_hidden_spellings_are_options_without_spaces() -> None:
    assert [name for name in (*ALIASES, *ALIASES.values()) if not name.startswith("-") or " " in name] == []


def test_what_follows_a_bare_double_dash_is_no_option() -> None:
    assert translate_aliases(["-device", "cpu", "--", "-device"]) == ["--device", "cpu", "--", "-device"]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--verbose", (True, False, True)),
        ("--quiet", (False, True, True)),
        ("--disable-progress", (False, False, False)),
        ("--debug", (True, False, True)),
    ],
)
def test_verbosity_options_may_follow_the_command(
    option: str, expected: tuple[bool, bool, bool], dataset: Path, passed_on: Callable[[str], dict[str, Any]]
) -> None:
    passed_on("plan")
    assert run("plan", option) == 0
    assert (console.settings.verbose, console.settings.quiet, console.settings.progress) == expected
    assert console.settings.debug == (option == "--debug")


@pytest.mark.parametrize("name", ["ein Ordner", "目录", "-leading", "x" * 235])
def test_folders_may_have_any_name(name: str, tmp_path: Path, passed_on: Callable[[str], dict[str, Any]]) -> None:
    seen = passed_on("plan")
    assert run("plan", "-d", name) == 0
    assert seen["dataset"] == Path(name)


# How it ends


def test_a_missing_data_set_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("plan", "preprocess", "finetune", "predict"):
        assert run(command) == 2
        assert capsys.readouterr().err == "error: no data set: the current folder has no dataset.json. Use -d DATASET\n"


@pytest.mark.parametrize(
    "arguments",
    [["segment"], ["plan", "--overwrit"], ["finetune", "-n", "0"], ["predict", "--prompt-slice", "first"], ["predict", "--part-id", "-1"]],
)
def test_a_usage_error_is_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert "Error:" in capsys.readouterr().err


def test_the_commands_return_value_is_the_exit_code() -> None:
    assert [run_for_exit_code(lambda code=code: code) for code in (0, 1, 2)] == [0, 1, 2]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UsageError("no such folder. Name one"), 2, ["error: no such folder. Name one"]),
        (PlanError("a\nb"), 2, ["error: a\\nb"]),
        (CaseError("c1", "c1.nii", "is empty", "Drop it"), 1, ["error: case c1: c1.nii: is empty. Drop it"]),
        (
            DatasetError("no case is usable", [CaseError("c1", "", "is empty", "Drop it"), CaseError("c2", "", "is flat", "Drop it")]),
            2,
            ["error: case c1: is empty. Drop it", "error: case c2: is flat. Drop it", "error: no case is usable"],
        ),
        (
            KeyboardInterrupt(),
            130,
            ["error: interrupted; finished results are kept. Run the same command again to resume (finetune, pretrain: add --continue)"],
        ),
        (
            Terminated(),
            143,
            ["error: terminated; finished results are kept. Run the same command again to resume (finetune, pretrain: add --continue)"],
        ),
        (ZeroDivisionError("by zero"), 2, ["error: unexpected ZeroDivisionError: by zero. Run again with --debug for the traceback"]),
    ],
)
def test_every_kind_of_error_has_its_exit_code_and_one_line(
    error: BaseException, code: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_for_exit_code(raising(error)) == code
    assert capsys.readouterr() == ("", "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("MPS backend out of memory"), RuntimeError("[enforce fail] can't allocate memory")]
)
def test_out_of_memory_is_reported_in_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_for_exit_code(raising(error)) == 2
    assert capsys.readouterr().err.startswith("error: out of memory. ")


def test_a_traceback_is_shown_only_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    run_for_exit_code(raising(UsageError("no")))
    assert "Traceback" not in capsys.readouterr().err
    run_for_exit_code(raising(UsageError("no")), debug=True)
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("error: no\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_program_with_its_code_and_one_line(number: signal.Signals, code: int) -> None:
    source = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from slmsam2_cli.cli import app
@app.command("slmsam2 hang")
def hang() -> int:
    os.kill(os.getpid(), {int(number)})
    time.sleep(30)
    return 0
sys.argv = ["slmsam2", "hang"]
app.main()
"""
    ended = in_a_process(source)
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (code, "", 1)


def test_a_reader_that_leaves_early_ends_the_program_quietly() -> None:
    source = """
import sys
from slmsam2_cli import console
from slmsam2_cli.cli import app
@app.command("slmsam2 talk")
def talk() -> int:
    while True:
        console.result("x" * 10000)
sys.argv = ["slmsam2", "talk"]
app.main()
"""
    command = [sys.executable, "-c", source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as talker:
        assert talker.stdout is not None
        assert talker.stderr is not None
        talker.stdout.read(10)
        talker.stdout.close()
        assert talker.stderr.read() == b""
        assert talker.wait(30) == 141


def test_the_shell_completes_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_SLMSAM2_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "slmsam2 pre")
    monkeypatch.setenv("COMP_CWORD", "1")
    completed = in_a_process("import sys; from slmsam2_cli.cli import app; sys.argv = ['slmsam2']; app.main()")
    assert set(completed.stdout.split()) == {"preprocess", "predict", "pretrain"}
