"""Word-level tokenizers with the post-processors of real ones, which add special tokens around a text."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[UNK]", "<bos>", "<eos>", "<system>", "<user>", "<assistant>"]
# Writes its own beginning and, as that of Llama 3 does, the end of every turn.
TEMPLATE = (
    "<bos> {% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(
    around: str = "<bos> $A <eos>", chat_template: str | None = None, words: int = 20
) -> PreTrainedTokenizerFast:
    """Words ``w0`` ... and ``SPECIAL``; ``around`` is the post-processor's template of one text."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(words))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    named = [(text, vocabulary[text]) for text in ("<bos>", "<eos>") if text in around]
    inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=named)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=chat_template,
    )
