"""Tokenizers of the bundled models: any text encodes, and every word that they know is one token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"


def byte_level_tokenizer(special: Sequence[str], vocabulary: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level, so any text encodes; every word of the vocabulary is one token; case is ignored."""
    # A prefix space makes a word the same token at the start of a turn and inside it.
    before = pre_tokenizers.ByteLevel(add_prefix_space=True)
    words = [before.pre_tokenize_str(word)[0][0] for word in vocabulary if word != "?"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    # With `ignore_merges` a word in the vocabulary is taken whole, and any other falls back to bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = before
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[token for token in special if token not in (PAD, BOS, EOS)],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


class Encoder:
    """Turns questions into token ids; each distinct text is tokenised once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        vocab = tokenizer.get_vocab()
        self.bos, self.user, self.assistant, self.eos = (vocab[t] for t in (BOS, USER, ASSISTANT, EOS))

    def text(self, text: str) -> list[int]:
        """Token ids of a text."""
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.cache[text]
