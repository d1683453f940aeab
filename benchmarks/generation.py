"""Tokens per CPU second of the built-in generator and of transformers' ``generate``, in one process.

    python benchmarks/generation.py --model MODEL_DIR --batch 8 --batch 32 --batch 96 --threads 1 --threads 2

Both get the same prompts of different lengths, some samples of each (the generator reads a prompt once,
transformers once a sample), draw from the whole vocabulary and make the same number of tokens. transformers
runs with every attention and cache that is named, and the fastest counts. Contenders take turns; the least
CPU time of a contender's rounds counts, since other processes only add to it. What the generator packs of the
weights is in its time. CPU time is that of all threads.
"""

from __future__ import annotations

import datetime
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import AutoConfig, AutoModelForCausalLM

app = typer.Typer(add_completion=False)

OURS = "gapo_mega"
# attention implementation and kind of cache
PEERS = ("sdpa-dynamic", "eager-dynamic", "sdpa-static")
Run = Callable[[list[list[int]], int], object]  # prompts, new tokens


@dataclass(frozen=True)
class Record:
    """One contender on one setting."""

    contender: str
    dtype: str
    threads: int
    batch: int
    samples: int  # of a prompt
    cpu_seconds: list[float]  # a round
    wall_seconds: list[float]
    tokens_per_cpu_second: float  # of the fastest round

    @property
    def setting(self) -> tuple[str, int, int, int]:
        """What contenders are compared in."""
        return self.dtype, self.threads, self.batch, self.samples


def ours(folder: Path, dtype: str, world: Any) -> Run:
    """The generator over a model of one process, whose groups are ``world``."""
    from gapo_mega.config import ModelConfig, ParallelConfig
    from gapo_mega.engine.base import SamplingParameters
    from gapo_mega.engine.megatron.checkpoint import weights
    from gapo_mega.engine.megatron.generation.generate import MegatronGenerator
    from gapo_mega.engine.megatron.model import build
    from gapo_mega.engine.megatron.runtime.cpu import megatron_device
    from gapo_mega.models import HFDirectory, shape_of

    shape = shape_of(HFDirectory(folder).config)
    with megatron_device():
        settings = ModelConfig.model_validate({"path": str(folder), "dtype": dtype})
        model = build.build_gpt(shape, settings, ParallelConfig())
        weights.load_hf(model, shape, folder)
    settings_of_all = {"vocabulary": shape.vocab, "pad_id": 0, "eos_ids": []}

    def run(prompts: list[list[int]], new: int) -> object:
        generator = MegatronGenerator([model], world, batch_size=len(prompts), **settings_of_all)
        return generator.generate(prompts, SamplingParameters(new), seed=1)

    return run


def peers(names: list[str], folder: Path, dtype: str) -> dict[str, Run]:
    """transformers' ``generate`` with one model, by attention and cache."""
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, trust_remote_code=False).eval()
    model.generation_config.eos_token_id = None  # every response has all its tokens

    def run(name: str, prompts: list[list[int]], new: int) -> object:
        attention, cache = name.split("-")
        model.set_attn_implementation(attention)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        found = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=0,
            cache_implementation=cache,
        )
        assert found.shape == (len(prompts), width + new), found.shape
        return found

    return {name: partial(run, name) for name in names}


def random_prompts(batch: int, samples: int, longest: int, vocabulary: int) -> list[list[int]]:
    """``batch`` rows: prompts of half to all of ``longest`` tokens, each of them ``samples`` times."""
    source = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = []
    while len(prompts) < batch:
        length = int(torch.randint(max(1, longest // 2), longest + 1, (), generator=source))
        prompt: list[int] = torch.randint(3, vocabulary, (length,), generator=source).tolist()
        prompts += [prompt] * samples
    return prompts[:batch]


def measure(runs: dict[str, Run], prompts: list[list[int]], new: int, rounds: int) -> dict[str, Any]:
    """CPU and wall seconds of every contender once a round, in turn, after a small warm-up of each."""
    for run in runs.values():
        run(prompts[:2], 2)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run(prompts, new)
            taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: {
            "cpu_seconds": [round(cpu, 3) for cpu, _ in times],
            "wall_seconds": [round(wall, 3) for _, wall in times],
            "tokens_per_cpu_second": round(len(prompts) * new / min(cpu for cpu, _ in times), 1),
        }
        for name, times in taken.items()
    }


def ratios(records: list[Record]) -> list[dict[str, Any]]:
    """The generator over the fastest of transformers', by setting."""
    found: list[dict[str, Any]] = []
    for own in (record for record in records if record.contender == OURS):
        others = [r for r in records if r.setting == own.setting and r.contender != OURS]
        best = max(others, key=lambda record: record.tokens_per_cpu_second)
        found.append(
            {
                "dtype": own.dtype,
                "threads": own.threads,
                "batch": own.batch,
                "samples": own.samples,
                "gapo_mega": own.tokens_per_cpu_second,
                "transformers": best.tokens_per_cpu_second,
                "best": best.contender,
                "ratio": round(own.tokens_per_cpu_second / best.tokens_per_cpu_second, 2),
            }
        )
    return found


def processor() -> str:
    """Its name, where the system tells."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@app.command(help=__doc__)
def main(
    model: Annotated[Path, typer.Option(help="a Hugging Face directory")],
    batch: Annotated[list[int], typer.Option(min=1, help="rows at once; repeat for several")],
    dtype: Annotated[list[str], typer.Option(help="fp32 or bf16; repeat for both")],
    threads: Annotated[list[int], typer.Option(min=1, help="of torch; repeat for several")],
    contender: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(PEERS)}; all if none")] = None,
    samples: Annotated[int, typer.Option(min=1, help="of every prompt")] = 4,
    longest_prompt: Annotated[int, typer.Option(min=1, help="tokens")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="of every response")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path, typer.Option(help="JSON file to write, or to add to")] = Path("generation.json"),
) -> None:
    """Measure, print and write."""
    unknown = [f"--dtype: found {d!r}, accepted: fp32 or bf16" for d in dtype if d not in ("fp32", "bf16")]
    unknown += [
        f"--contender: found {name!r}, accepted: {', '.join(PEERS)}"
        for name in contender or ()
        if name not in PEERS
    ]
    if unknown:
        typer.echo(f"error: {unknown[0]}", err=True)
        raise typer.Exit(2)
    from gapo_mega.engine.megatron.runtime import groups

    transformers.utils.logging.set_verbosity_error()
    vocabulary = AutoConfig.from_pretrained(model, trust_remote_code=False).vocab_size
    world = groups.initialize(1, 1)
    records = written(out)
    for kind in dtype:
        runs = {OURS: ours(model, kind, world)} | peers(contender or list(PEERS), model, kind)
        for count in threads:
            torch.set_num_threads(count)
            for rows in batch:
                prompts = random_prompts(rows, samples, longest_prompt, vocabulary)
                records = [r for r in records if r.setting != (kind, count, rows, samples)]
                records += [
                    Record(name, kind, count, rows, samples, **found)
                    for name, found in measure(runs, prompts, new_tokens, rounds).items()
                ]
                typer.echo(json.dumps(ratios(records)[-1]))
                write(out, model, longest_prompt, new_tokens, records)
    typer.echo(f"written: {out}")


def written(out: Path) -> list[Record]:
    """The records of an earlier run: it is up to the caller that prompts and responses were as long."""
    found = json.loads(out.read_text(encoding="utf-8"))["records"] if out.exists() else []
    return [Record(**record) for record in found]


def write(out: Path, model: Path, longest_prompt: int, new_tokens: int, records: list[Record]) -> None:
    """What has been measured so far."""
    result = {
        "date": str(datetime.date.today()),
        "model": model.name,
        "processor": processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "longest_prompt": longest_prompt,
        "new_tokens": new_tokens,
        "ratios": ratios(records),
        "records": [asdict(record) for record in records],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
