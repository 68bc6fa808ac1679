"""Train a small Whisper tokenizer: byte-level pairs from the corpus's texts, then Whisper's own tokens in its order.

Whisper's vocabulary does not come with any package, so the pairs are learnt here. The tokens after them are Whisper's:
end of text, start of transcript, 99 languages, the two tasks, four marks, then one token for every 0.02 s of the
window. transformers relies on that order: text below the end of text, timestamps right after <|notimestamps|>.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES

END, START, PREVIOUS = "<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>"
TRANSCRIBE, TRANSLATE = "<|transcribe|>", "<|translate|>"
NO_SPEECH, NO_TIMESTAMPS = "<|nospeech|>", "<|notimestamps|>"
LANGUAGE_CODES = list(LANGUAGES)[:99]  # the hundredth, Cantonese, came with large-v3
WINDOW_POSITIONS = 200  # of the encoder, in 4 s


def special_tokens() -> list[str]:
    """List Whisper's special tokens by id, without the timestamps, which are ordinary added tokens."""
    languages = [f"<|{code}|>" for code in LANGUAGE_CODES]
    return [END, START, *languages, TRANSLATE, TRANSCRIBE, "<|startoflm|>", PREVIOUS, NO_SPEECH, NO_TIMESTAMPS]


def timestamp_tokens() -> list[str]:
    """List the timestamps of a 4 s window, one every 0.02 s (an encoder position), both ends included."""
    return [f"<|{i * 0.02:.2f}|>" for i in range(WINDOW_POSITIONS + 1)]


def train_pairs(texts: list[str], num_tokens: int) -> models.BPE:
    """Learn at most ``num_tokens`` byte-level tokens from texts, the 256 bytes first.

    Learning stops early when every word of the texts is one token.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
    )
    learner.train_from_iterator(texts, trainer)
    return learner.model


def write_tokenizer(folder: Path, texts: list[str], num_tokens: int) -> None:
    """Write all tokenizer files of a Whisper folder, then check that texts round-trip."""
    folder.mkdir(exist_ok=True)
    train_pairs(texts, num_tokens).save(str(folder))  # vocab.json and merges.txt
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab[END] = len(vocab)
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    tokenizer = WhisperTokenizer(vocab=vocab, merges=merges, pad_token=END)
    names = special_tokens()
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken(name, special=True) for name in names]})
    stamps = [AddedToken(stamp, normalized=False, special=False) for stamp in timestamp_tokens()]
    tokenizer.add_tokens(stamps)
    tokenizer.save_pretrained(folder)
    # The published folders also have the files of the older, slow tokenizer.
    write_json(folder / "vocab.json", vocab)
    added = tokenizer.get_added_vocab()
    write_json(folder / "added_tokens.json", {name: i for name, i in added.items() if name != END})
    plain = {"bos_token": END, "eos_token": END, "pad_token": END, "unk_token": END}
    write_json(folder / "special_tokens_map.json", plain | {"additional_special_tokens": names})
    check_tokenizer(WhisperTokenizer.from_pretrained(folder), texts)


def check_tokenizer(tokenizer: WhisperTokenizer, texts: list[str]) -> None:
    """Assert that texts round-trip and that the special ids are where transformers computes them to be."""
    for text in (*texts, "가나다 힣 뷁 한자 漢字 🙂 naïve\n\t", "".join(map(chr, range(32, 0x2FF)))):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text, text
    ids = tokenizer.convert_tokens_to_ids([*special_tokens(), *timestamp_tokens()])
    assert ids == list(range(tokenizer.eos_token_id, len(tokenizer))), ids
    assert tokenizer.all_special_ids[-1] == tokenizer.convert_tokens_to_ids(NO_TIMESTAMPS)  # timestamps begin after it
    longest = max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    print(f"tokenizer: {len(tokenizer)} ids, {tokenizer.eos_token_id} of them text; at most {longest} to a phrase")


def write_json(path: Path, content: object) -> None:
    """Write JSON with Hangul unescaped."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
