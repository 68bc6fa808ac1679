"""Make a small Tekken tokenizer from a subset of the one that comes with mistral-common.

A byte-pair token can only be produced if the pairs that it is merged from are in the vocabulary too. So texts are
merged with the full vocabulary, and every pair on the way goes into the subset. The subset then merges the same texts
in the same way, because the next pair, the one with the lowest rank, is in it. Hangul syllables are added in the same
way. The rest is filled from the lowest ranks, which are closed under merging by construction. The 256 bytes come first,
so any UTF-8 text still round-trips.
"""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path

import mistral_common
import regex
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

NUM_SPECIAL_TOKENS = 100
SOURCE = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
# The ids of the published Voxtral; the other ids up to NUM_SPECIAL_TOKENS are fillers there as well.
AUDIO_SPECIALS = {24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 34: "[TRANSCRIBE]"}


def merged_pairs(piece: bytes, ranks: dict[bytes, int]) -> set[bytes]:
    """Merge one pre-token with the full vocabulary; return every pair that was merged."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    merged: set[bytes] = set()
    while len(parts) > 1:
        rank, index = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        if rank == len(ranks):
            break
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
        merged.add(parts[index])
    return merged


def choose_tokens(texts: list[str], ranks: dict[bytes, int], pattern: str, num_tokens: int) -> list[bytes]:
    """Choose ``num_tokens`` tokens: all bytes, those of the texts, Hangul syllables, then the lowest ranks.

    Returns:
        The tokens in order of rank.
    """
    chosen = {bytes([i]) for i in range(256)}
    split = regex.compile(pattern)
    for text in texts:
        for piece in split.findall(text):
            chosen |= merged_pairs(piece.encode(), ranks)
    num_from_texts = len(chosen) - 256
    syllables = [chr(code) for code in range(0xAC00, 0xD7A4)]
    syllable_tokens = [p for s in syllables for p in (s.encode(), (" " + s).encode()) if p in ranks]
    for token in sorted(syllable_tokens, key=ranks.__getitem__):
        pairs = merged_pairs(token, ranks)
        if len(chosen | pairs) > num_tokens - 1000:  # the last 1,000 are for the most frequent tokens of all languages
            break
        chosen |= pairs
    print(f"tokenizer: {num_from_texts} tokens from the texts, {len(chosen)} with Hangul syllables")
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(chosen) == num_tokens:
            break
        chosen.add(token)
    return sorted(chosen, key=ranks.__getitem__)


def special_tokens() -> list[dict]:
    """List the special tokens by id: Tekken's older ones, fillers, and Voxtral's three."""
    classic = {token["rank"]: str(token["token_str"]) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS}
    names = classic | AUDIO_SPECIALS
    return [
        {"rank": i, "token_str": names.get(i, f"<SPECIAL_{i}>"), "is_control": True} for i in range(NUM_SPECIAL_TOKENS)
    ]


def write_tokenizer(path: Path, texts: list[str], vocab_size: int) -> None:
    """Write a ``tekken.json`` of ``vocab_size`` ids with Voxtral's audio section for 4 s windows."""
    source = json.loads(SOURCE.read_text(encoding="utf-8"))
    num_tokens = vocab_size - NUM_SPECIAL_TOKENS
    inner = source["config"]["default_vocab_size"] - source["config"]["default_num_special_tokens"]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in source["vocab"][:inner]}
    pattern = source["config"]["pattern"]
    vocab = []
    for rank, token in enumerate(choose_tokens(texts, ranks, pattern, num_tokens)):
        try:
            shown = token.decode()
        except UnicodeDecodeError:
            shown = None
        vocab.append({"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": shown})
    out = {
        "config": {
            "pattern": pattern,
            "num_vocab_tokens": num_tokens,
            "default_vocab_size": vocab_size,
            "default_num_special_tokens": NUM_SPECIAL_TOKENS,
            "version": "v7",
        },
        "audio": {
            "sampling_rate": 16000,
            "frame_rate": 12.5,
            "audio_encoding_config": {"num_mel_bins": 128, "hop_length": 160, "window_size": 400},
            "chunk_length_s": 4.0,
        },
        "special_tokens": special_tokens(),
        "vocab": vocab,
    }
    path.write_text(json.dumps(out, ensure_ascii=False), encoding="utf-8")
    full = Tekkenizer.from_file(SOURCE)
    cut = Tekkenizer.from_file(path)
    shift = cut.num_special_tokens
    for text in texts:  # the same pieces as with the full vocabulary
        cut_pieces = [cut.id_to_byte_piece(i) for i in cut.encode(text, bos=False, eos=False)]
        full_pieces = [full.id_to_byte_piece(i) for i in full.encode(text, bos=False, eos=False)]
        assert cut_pieces == full_pieces, (text, cut_pieces, full_pieces)
    for text in ("가나다 힣 뷁 한자 漢字 🙂 naïve\n\t", "".join(map(chr, range(32, 0x2FF)))):
        assert cut.decode(cut.encode(text, bos=False, eos=False)) == text, text
    assert cut.n_words == vocab_size and shift == NUM_SPECIAL_TOKENS
