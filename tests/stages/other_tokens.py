"""World models that spell with other tokens: ids shuffled, or two digits in one token."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from headwater.models.language_model import LanguageModel, wrap

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def other_tokenizer(script: ModuleType, *, digits: bool) -> PreTrainedTokenizerFast:
    """The world's tokenizer with its ids in reverse order; with `digits` also one token for each of 10 to 19."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    merges = [(word[:i], word[i]) for word in ("user", "system", "assistant") for i in range(1, len(word))]
    merges += [("1", d) for d in "0123456789"] if digits else []
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*(a + b for a, b in merges), *alphabet]))}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    words = script.QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,2}|")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        chat_template=script.CHAT_TEMPLATE,
    )


@torch.no_grad()
def respelled(model: LanguageModel, tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    """The model with this tokenizer: each token has the embedding it had, or the mean of the tokens it is made of."""
    old: Any = model.module
    config = old.config.to_diff_dict()
    made: Any = Qwen3ForCausalLM(type(old.config)(**config | {"vocab_size": 64 * -(-len(tokenizer) // 64)}))
    made.generation_config.eos_token_id = tokenizer.eos_token_id
    weights = old.state_dict()
    table, rows = weights["model.embed_tokens.weight"], made.get_input_embeddings().weight.to(old.dtype).clone()
    for token, i in tokenizer.get_vocab().items():
        known = model.tokenizer.get_vocab()
        parts = [token] if token in known else list(token)
        rows[i] = table[[known[part] for part in parts]].mean(0)
    made = made.to(old.dtype)
    made.load_state_dict({**weights, "model.embed_tokens.weight": rows, "lm_head.weight": rows})
    made = made.eval().requires_grad_(any(p.requires_grad for p in old.parameters()))
    stops = tuple(s for s in model.config.stop_tokens if s in tokenizer.get_vocab())
    return wrap(made, tokenizer, model.config.model_copy(update={"stop_tokens": stops}))
