"""Every method by its name, aggregator or scalarizer: two steps of a tiny model in two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.optimize import nnls

from gapo_mega.planning.methods import names
from tests.helpers.commands import run
from tests.helpers.environment import ROOT
from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama

METHODS = names()
OBJECTIVES = ("short", "vowels")

# Ways to measure gradients, in each of which an audited update has to be the same step as one that is not.
MEASURED: dict[str, list[str]] = {
    "auto": [],
    "separate": ["gradients.forward=separate"],
    "single": ["gradients.store=single"],
    "last layer": ["gradients.scope=last_layer"],
}

# Safe scalarizers, with what else an update can be.
SAFE: dict[str, list[str]] = {
    "safe_rlhf": [
        "method=safe_rlhf",
        "aggregation.average=0.9",
        "algorithm.minibatches=2",
        "micro_batch_size=2",
    ],
    "morlhf": ["method=morlhf", "algorithm.kl=apart", "gradients.forward=separate"],
    "fast_rl": ["method={name: fast_rl, options: {rate: 0.5}}", "gradients.store=single"],
    "ctwa": ["method=ctwa", "advantages.name=gae", "algorithm.ppo_epochs=2"],
    "tchebycheff": ["method=tchebycheff", "gradients.scope=last_layer", "advantages.name=remax"],
}

# What has to be the same update in every layout of two replicas, by the log of rank 0.
SPREAD = {"tensor": ["parallel.tensor=2"], "pipeline": ["parallel.pipeline=2"]}
SCALARIZED = {
    "gdpo": ["method=gdpo"],
    "safe_rlhf": ["method=safe_rlhf", "scalarization.options.safe=true", "gradients.forward=separate"],
}
SGD = ["optimizer.name=sgd", "optimizer.distributed=false", "optimizer.clip_grad=0"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two objectives, a tiny model, and a method to replace."""
    folder = tmp_path_factory.mktemp("methods")
    tiny_llama(folder / "model", vocab=101, tied=True)
    byte_tokenizer(folder / "model", CHAT_TEMPLATE)
    lines = [json.dumps({"prompt": f"What is {i} plus {7 * i}?"}) for i in range(12)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "output_dir": str(folder / "unused"),
        "steps": 2,
        "micro_batch_size": 4,
        "model": {"path": str(folder / "model")},
        "data": {"source": str(folder / "prompts.jsonl"), "heldout_prompts": 0, "max_prompt_tokens": 90},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 6},
        "objectives": [{"name": n, "function": f"tests.helpers.rewards:{n}"} for n in OBJECTIVES],
        "aggregation": {"name": "gapo", "options": {"p": 1}},
        "optimizer": {"lr": 1e-2, "schedule": "constant", "warmup_fraction": 0.0},
        "checkpoint": {"export_hf": False},
        "logging": {"tensorboard": False, "progress": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def results(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of all names and ways to measure, in one launch."""
    folder = tmp_path_factory.mktemp("results")
    jobs: dict[str, list[str]] = {}
    for name, section in METHODS.items():
        audits = ["gradients.audit_every=2"] if section == "scalarization" else []
        jobs[name] = [f"method={name}", f"output_dir={folder / name}", *audits]
    asked = [("check_methods", {"config": str(config), "overrides": job}) for job in jobs.values()]
    for name, settings in SCALARIZED.items():
        jobs[f"spread {name}"] = [*settings, *SGD, f"output_dir={folder / f'spread_{name}'}"]
        asked.append(("check_methods", {"config": str(config), "overrides": jobs[f"spread {name}"]}))
    # SGD: Adam would divide by what is nearly 0, and show rounding as a whole step.
    plain = ["method=gdpo", *SGD]
    for name, settings in SAFE.items():
        jobs[f"safe {name}"] = [
            *settings,
            "scalarization.options.safe=true",
            f"output_dir={folder / f'safe_{name}'}",
        ]
        asked.append(("check_methods", {"config": str(config), "overrides": jobs[f"safe {name}"]}))
    for number, (way, settings) in enumerate(MEASURED.items()):
        audited = [*plain, *settings, "gradients.audit_every=1", f"output_dir={folder / f'audited{number}'}"]
        against = [*plain, *settings, f"output_dir={folder / f'plain{number}'}"]
        asked.append(("check_methods", {"config": str(config), "overrides": audited, "against": against}))
        jobs[f"measured {way}"] = audited
    return dict(zip(jobs, launch(2, asked, folder), strict=True))


@pytest.fixture(scope="module")
def spread(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """Of scalarizers on two replicas of two ranks, by layout and name, in one launch."""
    folder = tmp_path_factory.mktemp("spread")
    jobs: dict[tuple[str, str], dict[str, Any]] = {}
    for kind, layout in SPREAD.items():
        for name, settings in SCALARIZED.items():
            overrides = [*settings, *SGD, *layout, f"output_dir={folder / f'{kind}_{name}'}"]
            jobs[kind, name] = {"config": str(config), "overrides": overrides, "layout": {kind: 2}}
    found = launch(4, [("check_methods", arguments) for arguments in jobs.values()], folder)
    return dict(zip(jobs, found, strict=True))


@pytest.mark.parametrize("name", SCALARIZED)
@pytest.mark.parametrize("kind", SPREAD)
def test_a_scalarizer_takes_the_same_steps_in_every_layout(
    results: dict[str, dict[str, Any]], spread: dict[tuple[str, str], dict[str, Any]], kind: str, name: str
) -> None:
    """Two replicas on two ranks and on four sample the same responses, and measure the same gradients."""
    found, alone = spread[kind, name], results[f"spread {name}"]
    assert "error" not in found, found["error"]
    kinds = ("reward/", "reward_weight/", "weight/", "grad_norm/", "cosine/", "lambda/", "gradient_norm")
    for line, expected in zip(found["result"]["lines"], alone["result"]["lines"], strict=True):
        keys = [key for key in expected if key.startswith(kinds)]
        # Sums of fp32 in another order, whose difference moves the parameters of the second step.
        assert [line[key] for key in keys] == pytest.approx([expected[key] for key in keys], rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_two_steps(results: dict[str, dict[str, Any]], name: str) -> None:
    assert "error" not in results[name], results[name]["error"]
    first, second = results[name]["result"]["lines"]
    assert (first["skipped"], second["skipped"]) == (0.0, 0.0)
    assert all(f"reward/{objective}" in first for objective in OBJECTIVES)
    if METHODS[name] == "aggregation":
        assert all(f"grad_norm/{objective}" in first for objective in OBJECTIVES)
        return
    assert first["gradient_norm"] > 0 and first[f"weight/{name}"] == 1.0
    assert "grad_norm/short" not in first, "one gradient"
    for objective in OBJECTIVES:
        norms = second[f"grad_norm/{objective}"] * second[f"grad_norm/{name}"]
        cosine = second[f"cosine/{objective}/{name}"]
        # The log's numbers are products and quotients of each other in float64.
        assert second[f"predicted_change/{objective}"] == pytest.approx(cosine * norms, rel=1e-9)


@pytest.mark.parametrize("way", MEASURED)
def test_an_audited_update_takes_the_same_step(results: dict[str, dict[str, Any]], way: str) -> None:
    """To the rounding of fp32 gradients, summed in another order over two steps of rate 0.01."""
    found = results[f"measured {way}"]
    assert "error" not in found, found["error"]
    assert found["result"]["apart"] < 1e-6
    assert all("grad_norm/short" in line for line in found["result"]["lines"])


@pytest.mark.parametrize("name", SAFE)
def test_a_safe_scalarizer_raises_the_weights_it_starts_from(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    """Two rollouts of ranks that agree; every objective measured, by every strategy and estimator."""
    found = results[f"safe {name}"]
    assert "error" not in found, found["error"]
    lines = found["result"]["lines"]
    assert len(lines) == {"safe_rlhf": 4, "ctwa": 4}.get(name, 2)
    # The dual cone of the means' Gram matrix, where the weights follow from these.
    norm, cosine = ("averaged_norm", "averaged_cosine") if name == "safe_rlhf" else ("grad_norm", "cosine")
    for line in lines:
        assert line["skipped"] == 0.0
        norms = np.array([line[f"{norm}/{n}"] for n in OBJECTIVES])
        angle = np.arccos(line[f"{cosine}/{'/'.join(OBJECTIVES)}"])
        rows = norms[:, None] * np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
        given = np.array([line[f"reward_weight/{n}"] for n in OBJECTIVES])
        added, _ = nnls(rows.T, -rows.T @ given)
        weights = [line[f"weight/{n}"] for n in OBJECTIVES]
        np.testing.assert_allclose(weights, given + added, rtol=1e-6)  # arccos loses half of the digits
        if name == "morlhf":
            assert line["weight/kl"] == pytest.approx(0.05 * sum(weights), rel=1e-9)


def test_the_command_takes_a_method_by_name(config: Path, tmp_path: Path) -> None:
    """The demo's configuration with another method, its reports and its audit."""
    settings = yaml.safe_load(config.read_text())
    directory = tmp_path / "run"
    overrides = [
        "method=safe_rlhf",
        "scalarization.options.costs=[plain]",
        "gradients.audit_every=1",
        f"output_dir={directory}",
        f"model.path={settings['model']['path']}",
        "steps=2",
        "data.heldout_prompts=2",
        "evaluation.samples_per_prompt=1",
        "rollout.max_new_tokens=6",
        "data.max_prompt_tokens=120",
        "rollout.samples_per_prompt=2",
        "micro_batch_size=4",
        "logging.tensorboard=false",
        "checkpoint.export_hf=false",
    ]
    done = run("train", "--config", ROOT / "examples" / "demo.yaml", *overrides, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["conflict"] in (0.0, 1.0) for line in lines] == [True, True]
    assert lines[0]["reward_weight/concise"] + lines[0]["reward_weight/plain"] == pytest.approx(1.0)
    recorded = yaml.safe_load((directory / "config.yaml").read_text())
    assert recorded["scalarization"] == {"name": "safe_rlhf", "options": {"costs": ["plain"]}}
    assert "method" not in recorded and recorded["aggregation"]["options"] == {}
    page = (directory / "report" / "index.html").read_text()
    assert "safe_rlhf(costs=[&#39;plain&#39;]), one gradient" in page
    assert (directory / "report" / "reward_weights.png").exists()
    done = run("audit", directory)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "safe_rlhf" in done.stdout and "gapo p=1" in done.stdout
