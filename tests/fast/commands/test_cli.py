"""The command line inside this process: what it plans, and what it refuses in one line."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
import yaml

from gapo_mega import commands, optional
from gapo_mega.cli import app, main
from gapo_mega.config import Config
from gapo_mega.config.core_schema import parse_document
from tests.helpers.here import Here
from tests.helpers.run_files import write_run_file

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_file(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    for name in (*LAUNCHERS, "TORCHELASTIC_RUN_ID", "GAPO_MEGA_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    return Here(monkeypatch, capsys)


def test_dry_run_prints_a_configuration_layout_and_memory(file: Path, here: Here) -> None:
    code, out, _ = here(
        "train", "-c", str(file), "--dry-run", "--world", "4", "parallel.pipeline=2", "seed=9"
    )
    config = Config.model_validate(yaml.safe_load(out))
    assert (code, config.seed, config.parallel.pipeline, config.rollout.max_new_tokens) == (0, 9, 2, 16)
    assert "# layout: 4 processes = tensor 1 x pipeline 2 x data 2" in out
    assert "# step: 8 prompts x 4 samples = 32 sequences, 16 on a data-parallel rank" in out
    assert "stage 0     stage 1" in out
    assert not Path(config.output_dir).exists()


def test_dry_run_reads_the_first_rows_of_every_source(file: Path, here: Here, tmp_path: Path) -> None:
    rows = tmp_path / "rows[1].jsonl"
    rows.write_text('{"text": "Hi"}\n')
    read = (f"data.source={rows}", "data.prompt_column=text")
    code, out, _ = here("train", "-c", str(file), "--dry-run", *read, "data.heldout_source=some-org/prompts")
    assert code == 0 and f"# data.source '{rows}' (data.split 'train'): checked 1 usable rows" in out
    assert "# data.heldout_source 'some-org/prompts' (data.heldout_split 'test'): not checked" in out
    assert parse_document(out)["data"]["prompt_column"] == "text"
    for wrong, message in (
        (f"data.source={tmp_path}/absent.jsonl", "data.source: file"),
        (f"data.heldout_source={tmp_path}/absent.jsonl", "data.heldout_source: file"),
        ("data.prompt_column=prompt", "data.prompt_column: found 'prompt', accepted for"),
        ("data.source=/no/where", "data.source: found '/no/where', accepted"),
    ):
        for how in (("--dry-run",), ("--nproc", "2")):  # the latter before a process is started
            assert message in here.refused("train", "-c", str(file), *how, *read, wrong)


def test_an_error_shows_no_control_characters_of_a_path(file: Path, here: Here, tmp_path: Path) -> None:
    name = f"{tmp_path}/a\x1b[2Jb.jsonl"
    found = here.refused("train", "-c", str(file), "--dry-run", f"data.source={json.dumps(name)}")
    assert f"{tmp_path}/a\\x1b[2Jb.jsonl" in found and found.isprintable()
    found = here.refused("train", "-c", f"{tmp_path}/a\nb.yaml")
    assert f"{tmp_path}/a\\nb.yaml" in found and found.isprintable()


def test_an_error_of_a_long_value_keeps_its_beginning_and_its_end(file: Path, here: Here) -> None:
    found = here.refused("train", "-c", str(file), "--dry-run", f"data.split={'x' * 5000}")
    assert found.startswith("data.split: found 'xxx") and len(found) <= 2000
    assert "xxx [...] xxx" in found and ", accepted for " in found


@pytest.mark.parametrize(
    "arguments", [("train", "-c"), ("sft", "-c"), ("compare",), ("convert", "--to", "out", "--from")]
)
def test_a_name_that_no_file_system_has_is_one_line(here: Here, arguments: tuple[str, ...]) -> None:
    assert "name too long: 'xxx" in here.refused(*arguments, "x" * 5000)


@pytest.mark.parametrize("command", ["sft", "train-reward"])
def test_supervised_runs_read_first_rows_before_they_start_processes(
    file: Path, here: Here, tmp_path: Path, command: str
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "Hi"}\n')
    run = tmp_path / "run.yaml"
    run.write_text(
        f"output_dir: {tmp_path}/run\nmodel: {{path: {file.parent}/model, max_tokens: 64}}\n"
        f"data: {{source: {tmp_path}/rows.jsonl, format: columns}}\n"
    )
    column = "prompt" if command == "sft" else "chosen"
    found = here.refused(command, "-c", str(run), "--nproc", "2")
    assert found == f"data.{column}_column: found '{column}', accepted for '{tmp_path}/rows.jsonl': text"
    found = here.refused(
        command, "-c", str(run), "--nproc", "2", "data.heldout_source=x.jsonl", "data.source=x.json"
    )
    assert found == "data.source: file 'x.json' not found"


def test_a_tilde_in_an_option_is_the_home_directory(
    file: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    code, out, _ = here(
        "train", f"--config=~/{file.name}", "--dry-run", "output_dir=~/here", "model.path=~/model"
    )
    assert (code, parse_document(out)["output_dir"]) == (0, f"{file.parent}/here")
    code, _, _ = here("plan", f"--config=~/{file.name}")
    assert code == 0
    assert f"{file.parent}/absent.gguf not found" in here.refused(
        "convert", "--from=~/absent.gguf", "--to=~/new"
    )
    (file.parent / "there").mkdir()
    assert f"{file.parent}/there exists already" in here.refused("convert", "--from=~/model", "--to=~/there")
    assert f"{file.parent}/none" in here.refused("audit", "~/none")
    assert f"{file.parent}/none.yaml not found" in here.refused("serve-reward", "--config=~/none.yaml")
    assert f"{file.parent}/none.yaml not found" in here.refused("benchmark", "step", "--config=~/none.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rollout.temprature=1",), "rollout.temprature: unknown key, the nearest is 'temperature'"),
        (("--world", "3", "parallel.tensor=2"), "= 2 processes on a world of 3, accepted"),
        (("model.path=/nowhere",), "model.path: found '/nowhere'"),
        (("objectives.0.function=gapo_mega.demo.rewards:concize",), "objective 'concise'"),
        (("aggregation.name=gap",), "gap"),
    ],
)
def test_user_errors_are_one_line(file: Path, here: Here, arguments: tuple[str, ...], message: str) -> None:
    assert message in here.refused("train", "--config", str(file), "--dry-run", *arguments)


def test_options_that_do_not_go_together(file: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ("train", "--config", str(file))
    assert "--world: found 2 without --dry-run" in here.refused(*run, "--world", "2")
    # The run is checked before processes are started, because torchrun buries the error of a worker.
    assert "rollout.prompts_per_step: found 8" in here.refused(*run, "--nproc", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert "--nproc: found 2 inside torchrun" in here.refused(*run, "--nproc", "2")


@pytest.mark.parametrize(
    "command", ["train", "dry-run", "sft", "train-reward", "train-pairs", "benchmark", "convert"]
)
@pytest.mark.parametrize(
    ("left", "message"),
    [
        ({"RANK": "3"}, "RANK: found '3' without WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: found ''"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "MASTER_ADDR: found None with WORLD_SIZE 4"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK: found '1' without RANK"),
    ],
)
def test_what_a_launcher_left_behind_is_told_at_once(
    file: Path, here: Here, monkeypatch: pytest.MonkeyPatch, command: str, left: dict[str, str], message: str
) -> None:
    """In every command that starts processes or joins them; none of them waits, and none writes."""
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    model, out = file.parent / "model", file.parent / "out"
    supervised = file.parent / "supervised.yaml"
    supervised.write_text(
        f"output_dir: {out}\nmodel: {{path: {model}}}\ndata: {{source: {file.parent / 'absent.jsonl'}}}\n"
    )
    pairs = file.parent / "pairs.yaml"
    pairs.write_text(
        f"output_dir: {out}\nmodel: {{path: {model}}}\n"
        f"objectives: [{{name: a, data: {{source: {file.parent / 'absent.jsonl'}}}}}]\n"
    )
    lines = {
        "train": ("train", "-c", str(file)),
        "dry-run": ("train", "-c", str(file), "--dry-run"),
        "sft": ("sft", "-c", str(supervised)),
        "train-reward": ("train-reward", "-c", str(supervised)),
        "train-pairs": ("train-pairs", "-c", str(pairs)),
        "benchmark": ("benchmark", "step", "-c", str(file), "--out", str(out / "x.json")),
        "convert": ("convert", "--from", str(model), "--to", str(out)),
    }
    if command == "dry-run" and message.startswith("MASTER_ADDR"):  # which meets nobody
        assert here(*lines[command])[0] == 0
    else:
        assert message in here.refused(*lines[command])
    assert not out.exists()


def test_errors_show_where_they_were_raised_on_demand(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAPO_MEGA_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["gapo-mega", "train", "--config", str(file), "sed=1"])
    with pytest.raises(ValueError, match="sed: unknown key, the nearest is 'seed'"):
        main()


def test_convert_refuses_what_it_cannot_read(tmp_path: Path, here: Here) -> None:
    (tmp_path / "model.bin").touch()
    for source, found in (
        ("absent.gguf", "absent.gguf not found"),
        ("model.bin", "found the file"),
        ("absent", "absent not found; accepted: a directory, a hub name or a .gguf file"),
    ):
        line = here.refused("convert", "--from", str(tmp_path / source), "--to", str(tmp_path / "out"))
        assert found in line


def test_a_plan_is_said_to_be_a_prediction(file: Path, here: Here) -> None:
    code, out, _ = here("plan", "-c", str(file), "--device-gib", "80")
    *_, fullest, caveat = out.strip().splitlines()
    assert code == 0
    assert fullest.startswith("fullest rank: ") and "MiB, fits into 80 GiB" in fullest
    assert not fullest.startswith("fullest rank: 0.00")  # a tiny model is shown in a unit that it has
    assert caveat.startswith("Predicted, not measured. Not counted: the device's context")
    line = here.refused("plan", "-c", str(file), "--device-gib", "inf")
    assert line == "--device-gib: found inf, accepted: a finite number of GiB, 0 or more"


def test_a_plan_says_how_fast_a_step_could_be(file: Path, here: Here) -> None:
    asked = ("plan", "-c", str(file), "--device", "H100", "--response-tokens", "5")
    code, out, _ = here(*asked)
    *_, ceiling, caveat = out.strip().splitlines()
    assert code == 0
    assert ceiling.startswith("at most ") and "tokens/s/GPU on 1 x H100" in ceiling
    assert (
        caveat.startswith("A ceiling from data sheets, at 40% of the peak") and "not a measurement" in caveat
    )
    told = json.loads(here(*asked, "--json")[1])["ceiling"]
    assert told["seconds_per_step"] == pytest.approx(sum(told["phases_seconds"].values()))
    line = here.refused("plan", "-c", str(file), "--device", "RTX 4090")
    assert line.startswith("--device: found 'RTX 4090', accepted: A100, H100, ")
    line = here.refused("plan", "-c", str(file), "--prompt-tokens", "9")
    assert line == "--prompt-tokens: found 9 without --device, which it is for"


def test_info_tells_what_is_usable_not_what_is_used(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"transformer-engine-torch": "2.11", "wandb": "0.20"}

    def version(name: str) -> str:
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    probes = (optional.transformer_engine, optional.apex, optional.wandb, optional.serve, optional.einops)
    for probe in probes:
        probe.cache_clear()
    monkeypatch.setattr(optional, "version", version)
    try:
        _, out, _ = here("info")
    finally:
        for probe in probes:
            probe.cache_clear()
    # Transformer Engine's layers need a GPU; whether wandb is used, a run's configuration says.
    on_gpus = "usable" if torch.cuda.is_available() else "usable on GPUs only, and there is none"
    assert f"transformer-engine {on_gpus}: transformer-engine-torch 2.11" in out
    assert "wandb              usable: wandb 0.20" in out and " used:" not in out


def test_every_file_of_a_command_is_registered() -> None:
    """``gapo_mega/commands`` holds one command a file, and what several of them share."""
    served = {"reward_app", "reward_limits", "reward_protocol", "reward_server", "reward_turns"}
    shared = {"__init__", "chat_terminal", "launch", "options", "supervised", *served}
    folder = Path(commands.__file__).parent
    names = {path.stem for path in folder.glob("*.py")} - shared
    found = {
        *(command.callback.__name__ for command in app.registered_commands if command.callback),
        *(str(group.name) for group in app.registered_groups),
    }
    assert found == names
