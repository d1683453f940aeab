"""Credentials that are written out are refused when a configuration is loaded; other texts are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gapo_mega.config import Config, ObjectiveConfig, Section
from gapo_mega.config.core_schema import parse_document
from gapo_mega.config.judges import JudgesConfig
from gapo_mega.config.loading import load, parse, to_yaml
from gapo_mega.config.supervised import RewardModelConfig
from gapo_mega.config.sweep import SweepConfig
from gapo_mega.credentials import first_written_out
from gapo_mega.objectives.pairwise import PairwiseOptions

ROOT = Path(__file__).resolve().parents[3]
BASE: dict[str, Any] = {
    "output_dir": "runs/x",
    "model": {"path": "m"},
    "data": {"source": "prompts.jsonl"},
    "objectives": [{"name": "short", "function": "a.b:c", "options": {"nested": [{}]}}],
    "logging": {"loggers": [{"name": "mlflow"}]},
}
OPTIONS = "objectives.0.options"
HF_KEY = "hf_" + "aB3dE6gH9j" * 3 + "aBcd"


def config(*overrides: str) -> Config:
    data = json.loads(json.dumps(BASE))
    return parse(data, overrides, Config, "run.yaml")


def refusal(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        config(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "place",
    [
        "output_dir",
        "model.path",
        "data.source",
        "data.heldout_source",
        "data.system_prompt",
        "rollout.vllm.url",
        "rollout.vllm.weights_directory",
        "rollout.vllm.environment.X",
        "checkpoint.export_to",
        "evaluation.shared",
        "logging.wandb_project",
        "logging.loggers.0.options.tracking_uri",
        "aggregation.options.place",
        f"{OPTIONS}.place",
        f"{OPTIONS}.url",
        f"{OPTIONS}.nested.0.place",
    ],
)
@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("https://me:hunter2@host/x", "a password in it"),
        ("s3://key:hunter2@bucket/a", "a password in it"),
        ("postgresql+psycopg://me:hunter2/x@db:5432/runs", "a password in it"),
        ("https://hunter2:@host", "a password in it"),
        ("simplecache::https://me:hunter2@[::1]:80/x", "a password in it"),
        ("https://host/x.jsonl?a=1&access_token=hunter2", "the parameter 'access_token'"),
        ("https://host/x?X-Amz-Signature=hunter2#part", "the parameter 'X-Amz-Signature'"),
        (f"https://host/{HF_KEY}/x", "what looks like the key of a service"),
    ],
)
def test_addresses_are_refused_wherever_they_stand(place: str, value: str, found: str) -> None:
    line = refusal(f"{place}={json.dumps(value)}")
    assert line.startswith(f"{place}: found {found}, accepted: none (")
    assert line.endswith(f"(from override '{place}=***')")
    assert "hunter2" not in line and HF_KEY not in line
    free = "options" in place or "environment" in place
    assert ("env:NAME" in line) == free and ("environment variables" in line) != free


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "HF_TOKEN",
        "X-Auth-Token",
        "accessToken",
        "api_key",
        "apiKey",
        "OPENAI_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "password",
        "MLFLOW_TRACKING_PASSWORD",
        "db_pwd",
        "client_secret",
        "credentials",
        "Authorization",
        "basic_auth",
        "cookie",
        "reward_token",
    ],
)
@pytest.mark.parametrize(
    "place",
    [
        "rollout.vllm.environment",
        "logging.loggers.0.options",
        "aggregation.options",
        "scalarization.options",
        "advantages.options",
        "loss.options",
        OPTIONS,
        f"{OPTIONS}.nested.0",
    ],
)
def test_what_has_the_name_of_a_secret_is_named_and_not_written_out(place: str, name: str) -> None:
    line = refusal(f"{place}.{name}=hunter2-visible")
    assert line == (
        f"{place}.{name}: found a value that is written out, accepted: 'env:NAME', the value of an "
        "environment variable, or 'file:PATH', the text of a file (a run keeps its configuration in its "
        f"folder and report) (from override '{place}.{name}=***')"
    )
    extra = ["scalarization.name=weighted_sum"] if place.startswith("scalarization") else []
    for named in ("env:MY_TOKEN", "file:/run/secrets/token"):
        assert named in to_yaml(config(*extra, f"{place}.{name}={named}"))


def test_a_list_of_values_is_as_secret_as_one() -> None:
    line = refusal("rollout.vllm.environment.HF_TOKEN=[env:A, hunter2]")
    assert line.startswith("rollout.vllm.environment.HF_TOKEN.1: found a value that is written out")
    assert "hunter2" not in line


@pytest.mark.parametrize(
    "arguments",
    ['["--api-key", "hunter2"]', '["--x", "--api-key=hunter2"]', '["--hf-token", "env:HUNTER2"]'],
)
def test_arguments_of_a_server_hold_no_secret(arguments: str) -> None:
    line = refusal(f"rollout.vllm.arguments={arguments}")
    assert "that is written out, accepted: none (every user of the machine sees arguments;" in line
    assert "rollout.vllm.environment takes 'env:NAME'" in line and "hunter2" not in line.lower()


HARMLESS: dict[str, Any] = {
    "max_new_tokens": "64",
    "tokens": "a b c",
    "tokenizer": "org/tokenizer-with-name",
    "tokenization": "whitespace",
    "token_type": "subword",
    "pad_token_id": 3,
    "pad_token": "<|endoftext|>",
    "eos_token": "endoftext",
    "good_token": "+",
    "token": "<s>",
    "answer_key": "the answer",
    "key": "score of the row",
    "keyword": "something",
    "monkey": "something",
    "signature": "question -> answer",
    "author": "somebody else",
    "auth_method": "kerberos",
    "password_column": "column of the data",
    "secretary": "somebody else",
    "token_file": "/run/secrets/token",
    "GOOGLE_APPLICATION_CREDENTIALS": "/run/secrets/google.json",
    "api_key": "",
    "password": 12,
    "api_keys": [],
    "max_tokens": 12,
    "prompt": "Basic rules: the token is hidden, Bearer of good news, key=value, me:you@home",
    "repository": "hf_checkpoints/sk-learn-models-of-2024",
    "place": "http://localhost:8000/packages/@scope/name",
    "other_place": "http://[::1]:8000/me@here",
    "bucket": "abfs://container@account.dfs.core.windows.net/a:b",
    "share": "sftp://me@host/a",
    "question": "https://host/x?model=small&max_tokens=3&design=4&tokenizer=a",
    "json": '{"a": "http://host", "b": "c@d"}',
    "template": "https://{{ user }}:{{ word }}@host",
    "local": "file:///tmp/mlruns",
}


@pytest.mark.parametrize("place", [OPTIONS, "logging.loggers.0.options", "aggregation.options"])
@pytest.mark.parametrize("name", HARMLESS)
def test_other_names_and_texts_are_harmless(place: str, name: str) -> None:
    found = config(f"{place}.{name}={json.dumps(HARMLESS[name])}")
    assert json.dumps(HARMLESS[name]) in json.dumps(found.model_dump(mode="json"))


def test_harmless_arguments_and_variables_pass() -> None:
    arguments = ["--tokenizer-mode", "auto", "--hf-token", "--enforce-eager", "--max-tokens", "9"]
    environment = {"CUDA_VISIBLE_DEVICES": "0,1", "TOKENIZERS_PARALLELISM": "false", "HF_TOKEN_PATH": "/x"}
    found = config(
        f"rollout.vllm.arguments={json.dumps(arguments)}",
        f"rollout.vllm.environment={json.dumps(environment)}",
    )
    assert found.rollout.vllm.arguments == arguments and found.rollout.vllm.environment == environment


REWARD: dict[str, Any] = {
    "output_dir": "o",
    "model": {"path": "m"},
    "data": {"source": "https://me:hunter2@host/pairs.jsonl", "format": "columns"},
}


@pytest.mark.parametrize(
    ("kind", "data", "place"),
    [
        (RewardModelConfig, REWARD, "data.source"),
        (ObjectiveConfig, {"name": "a", "options": {"api_key": "hunter2"}}, "options.api_key"),
        (
            JudgesConfig,
            {"objectives": [{"name": "a", "options": {"db": {"password": "hunter2"}}}]},
            "objectives.0.options.db.password",
        ),
        (PairwiseOptions, {"headers": {"Authorization": "hunter2"}}, "headers.Authorization"),
        (SweepConfig, {"settings": {f"{OPTIONS}.token": "hunter2"}}, f"settings.{OPTIONS}.token"),
        (
            SweepConfig,
            {"grid": {"rollout.vllm.environment.HF_TOKEN": ["hunter2"]}},
            "grid.rollout.vllm.environment.HF_TOKEN.0",
        ),
        (
            SweepConfig,
            {"warm_start": {"settings": {"data.source": "https://me:hunter2@host/x"}}},
            "warm_start.settings.data.source",
        ),
    ],
)
def test_every_kind_of_configuration_is_looked_through(
    tmp_path: Path, kind: type[Section], data: dict[str, Any], place: str
) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match="found") as caught:
        load(file, kind=kind)
    assert str(caught.value).startswith(f"{place}: found") and str(caught.value).endswith(f"(from {file})")
    assert "hunter2" not in str(caught.value)
    assert ("env:NAME" in str(caught.value)) == ("data.source" not in place)


def test_what_makes_a_response_good_is_no_secret() -> None:
    data = {
        "url": "http://host",
        "model": "m",
        "rubrics": {"secrets": "It reveals no password.", "token": "It is short."},
    }
    assert parse(data, (), PairwiseOptions, "judge.yaml").rubrics["secrets"]


def test_an_override_that_cannot_be_read_does_not_show_a_secret_either() -> None:
    assert f"override '{OPTIONS}.token=***': value not readable" in refusal(f"{OPTIONS}.token=[hunter2")


def test_a_long_text_takes_no_time() -> None:
    for piece in ("a", "://a:", "sk-A", "eyJ", "?key", "--token"):
        config(f"data.system_prompt={json.dumps('x ' + piece * 20_000)}")


def test_no_example_has_one() -> None:
    files = [*ROOT.glob("examples/**/*.yaml"), *ROOT.glob("benchmarks/**/*.yaml")]
    assert len(files) > 10
    for file in files:
        assert first_written_out(parse_document(file.read_text())) is None, file
