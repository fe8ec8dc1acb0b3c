"""A text found in a run of tokens by its letters, whatever else its tokens hold.

`</think>` may come as `</`, `think`, `>` or as `.</`, `think`, `>\n\n`: in a byte-pair vocabulary letters merge with
what stands beside them. All such ways are found by one automaton over tokens, shift-and of Baeza-Yates and Gonnet
(1992): bit i of a state says that the text so far ends with the first i letters. What a token does to the bits is
looked up in five tables, so that a pass takes a few operations on the device for each letter of the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_LONGEST = 62  # bits of a state
_TELLS = 2  # letters: `<` alone is also the beginning of much else
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # how byte-level vocabularies write a byte


@dataclass(frozen=True, eq=False, repr=False)
class Needle:
    """One text, and what each token does to the letters of it that have been seen.

    Tables of a number a token, and a last one for no token: `starts` and `inner` are bits, of what a token begins and
    of where it goes on; `length` its letters; `last` the bits with which it completes the text; `whole` that it holds
    all of it. `writes` is, for each number of letters seen, the token that writes on from there.
    """

    text: str
    letters: tuple[bytes, ...]
    starts: Int[Tensor, " tokens"]
    inner: Int[Tensor, " tokens"]
    length: Int[Tensor, " tokens"]
    last: Int[Tensor, " tokens"]
    whole: Bool[Tensor, " tokens"]
    writes: tuple[int, ...]
    copies: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)  # of the tables, on other devices

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str) -> "Needle | None":
        """None where the text is written in tokens of its own, which merge with nothing, or a vocabulary's tokens are
        not the text cut up (words between which a tokenizer puts spaces)."""
        ids, wanted = tokenizer.encode(text, add_special_tokens=False), text.encode()
        if set(ids) <= set(tokenizer.added_tokens_decoder) or not (text.isascii() and 1 < len(wanted) <= _LONGEST):
            return None
        letters = _letters(tokenizer)
        probe = f"a.{text}\nb"
        cut_up = b"".join(letters[i] for i in tokenizer.encode(probe, add_special_tokens=False))
        if cut_up.strip() != probe.encode():
            return None
        writes = [tokenizer.encode(text[n:], add_special_tokens=False)[0] for n in range(len(text))]
        return cls(text, letters, *_tables(letters, wanted), tuple(writes))

    def seen(self, ids: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        """At each token, the bits of how many letters of the text end there, less than all. Below 0 is no token."""
        starts, inner, length = (self._at(name, ids) for name in ("starts", "inner", "length"))
        bits = starts
        for _ in range(min(len(self.text), ids.shape[1]) - 1):
            bits = starts | ((_before(bits) & inner) << length)
        return bits

    def ends(self, ids: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """The tokens in which the text ends."""
        return self.completed(_before(self.seen(ids)), ids)

    def completed(self, bits: Int[Tensor, "*shape"], ids: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Does the token `ids`, after `bits`, complete the text?"""
        return self._at("whole", ids) | ((bits & self._at("last", ids)) != 0)

    def begun(self, bits: Int[Tensor, "*shape"], ids: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Is it the token `ids`, after `bits`, with which the text can be told: two letters of it, or all?"""
        after = self._at("starts", ids) | ((bits & self._at("inner", ids)) << self._at("length", ids))
        return ((bits >> _TELLS) == 0) & (((after >> _TELLS) != 0) | self.completed(bits, ids))

    def ending(self, ids: Int[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
        """The bits at the last token of each row."""
        return self.seen(ids[:, -len(self.text) :])[:, -1]

    def partial(self, bits: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """How many letters of the text these bits say have been seen, the most of it but not all."""
        counts = torch.arange(len(self.text), device=bits.device)
        return (((bits[:, None] >> counts) & 1) * counts).amax(1)

    def first(self, ids: Sequence[int]) -> tuple[int, int, str, str] | None:
        """The first tokens that hold the text, from and to, and the letters of theirs before and after it."""
        if not len(ids):
            return None
        hits = self.ends(torch.tensor([list(ids)]))[0].nonzero()
        if not len(hits):
            return None
        end, wanted = int(hits[0]) + 1, self.text.encode()
        start, held = end, b""
        while wanted not in held:
            start -= 1
            held = self.letters[ids[start]] + held
        before, _, after = held.partition(wanted)
        return start, end, before.decode(errors="replace"), after.decode(errors="replace")

    def _at(self, name: str, ids: Tensor) -> Tensor:
        key = (name, ids.device)
        if key not in self.copies:
            self.copies[key] = getattr(self, name).to(ids.device)
        table, none = self.copies[key], len(self.starts) - 1
        return table[ids.where((ids >= 0) & (ids < none), none)]


def _before(bits: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(bits[:, :1]), bits[:, :-1]], dim=1)


def _letters(tokenizer: PreTrainedTokenizerBase) -> tuple[bytes, ...]:
    """The bytes of each token; none for special ones, which break a text."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = backend is not None and "ByteLevel" in str(backend.decoder)

    def bytes_of(i: int, token: str | None) -> bytes:
        if token is None or i in special:
            return b""
        if i in added:
            return token.encode()
        if byte_level:
            return bytes(_BYTES[c] for c in token if c in _BYTES)
        if len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    return tuple(bytes_of(i, token) for i, token in enumerate(tokens))


def _tables(letters: Sequence[bytes], wanted: bytes) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, rows = len(wanted), []
    for held in (*letters, b""):
        size = len(held)
        if not size or (held[0] not in wanted and held[-1] not in wanted and wanted not in held):
            rows.append((0, 0, 0, 0, False))  # most tokens share no letter with it
            continue
        starts = sum(1 << i for i in range(1, n) if held.endswith(wanted[:i]))
        inner = sum(1 << i for i in range(1, n - size) if wanted[i : i + size] == held)
        last = sum(1 << i for i in range(max(1, n - size), n) if held.startswith(wanted[i:]))
        rows.append((starts, inner, size if inner else 0, last, wanted in held))
    starts_of, inner_of, length, last_of, whole = (torch.tensor(column) for column in zip(*rows, strict=True))
    return starts_of, inner_of, length, last_of, whole
