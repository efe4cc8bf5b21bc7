"""Turn text into tokens as Apache Lucene 9's EnglishAnalyzer does (Anserini's and pyserini's).

StandardTokenizer -> EnglishPossessiveFilter -> LowerCaseFilter -> StopFilter -> PorterStemFilter.
The tokenizer follows the word boundaries of UAX #29 (https://unicode.org/reports/tr29/) with
Lucene's changes: tokens of South-East Asian scripts are whole runs, Han and Hiragana are single
characters, emoji sequences (UTS #51) are tokens, `_` alone is none. tests/data/lucene holds what
Lucene itself answered.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import regex

# names the analysis in a cached index; regex brings the Unicode tables
ANALYZER_VERSION = f"1, regex {regex.__version__}"

MAX_LENGTH = 255  # UTF-16 code units: Lucene cuts longer tokens

STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with".split()
)

# Extended_Pictographic of Unicode 12.1, Lucene's version (emoji-data.txt); Unicode 17 took ★ and ♪
# out.
_PICTURE_CODES = (
    "A9 AE 203C 2049 2122 2139 2194-2199 21A9-21AA 231A-231B 2328 2388 23CF 23E9-23F3 "
    "23F8-23FA 24C2 25AA-25AB 25B6 25C0 25FB-25FE 2600-2605 2607-2612 2614-2685 2690-2705 "
    "2708-2712 2714 2716 271D 2721 2728 2733-2734 2744 2747 274C 274E 2753-2755 2757 2763-2767 "
    "2795-2797 27A1 27B0 27BF 2934-2935 2B05-2B07 2B1B-2B1C 2B50 2B55 3030 303D 3297 3299 "
    "1F000-1F0FF 1F10D-1F10F 1F12F 1F16C-1F171 1F17E-1F17F 1F18E 1F191-1F19A 1F1AD-1F1E5 "
    "1F201-1F20F 1F21A 1F22F 1F232-1F23A 1F23C-1F23F 1F249-1F3FA 1F400-1F53D 1F546-1F64F "
    "1F680-1F6FF 1F774-1F77F 1F7D5-1F7FF 1F80C-1F80F 1F848-1F84F 1F85A-1F85F 1F888-1F88F "
    "1F8AE-1F8FF 1F90C-1F93A 1F93C-1F945 1F947-1FFFD"
)


def _compile_pictures() -> str:
    """Return the members of a character class: code points and ranges of them."""
    escaped = regex.sub("[0-9A-F]+", lambda code: rf"\U{int(code[0], 16):08X}", _PICTURE_CODES)
    return escaped.replace(" ", "")


_PICTURES = _compile_pictures()


def _compile_token_pattern() -> regex.Pattern:
    """Compile the pattern whose every match is one token.

    Every quantifier is possessive: classes that may follow each other are disjoint.
    """
    # Word_Break classes of UAX #29. U+00B8 and U+055F changed theirs after 12.1, and ":" goes in
    # and out of MidLetter.
    letter = r"[\p{WB=ALetter}--\u00B8]"
    hebrew_letter = r"\p{WB=Hebrew_Letter}"
    digit = r"\p{WB=Numeric}\uFF10-\uFF19"
    katakana = r"\p{WB=Katakana}"
    low_line = r"\p{WB=ExtendNumLet}"
    quote = r"\p{WB=Single_Quote}"
    mid_letter = r"[\p{WB=MidLetter}--\u055F]:\p{WB=MidNumLet}" + quote
    mid_digit = r"\p{WB=MidNum}\p{WB=MidNumLet}" + quote
    # rule WB4: these belong to the character before them
    mark = r"\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}"
    x = f"[{mark}]*+"

    # A Hebrew letter keeps a quote after it and joins another over a double quote; Lucene tries
    # that first.
    hebrew = rf"[{hebrew_letter}]{x}(?:[{quote}]{x}|\p{{WB=Double_Quote}}{x}[{hebrew_letter}]{x})"
    letters = (
        rf"(?:[{letter}][{letter}{mark}]*+|[{hebrew_letter}]{x})"
        rf"(?:[{mid_letter}]{x}[{letter}{hebrew_letter}]{x})*+"
    )
    digits = rf"[{digit}][{digit}{mark}]*+(?:[{mid_digit}]{x}[{digit}]{x})*+"
    run = rf"(?:(?:{hebrew}|{letters}|{digits})++|[{katakana}][{katakana}{mark}]*+)"
    join = f"[{low_line}][{low_line}{mark}]*+"
    word = f"(?:{join})?+{run}(?:{join}{run})*+(?:{join})?+"

    tone = r"\U0001F3FB-\U0001F3FF"
    # emoji style, skin tone, tags; not U+FE0E, text style
    style = rf"[\uFE0F{tone}\U000E0020-\U000E007F]*+"
    emoji = (
        rf"\u200D?+[{_PICTURES}{tone}]{style}(?:\u200D[{_PICTURES}]{style})*+(?:(?<!\uFE0F)\u200D)?+"
        r"|\p{WB=Regional_Indicator}{2}|[#*]\uFE0F?\u20E3"
    )
    south_east_asian = rf"\p{{LB=SA}}[\p{{LB=SA}}{mark}]*+"
    single = rf"[\p{{Script=Han}}\p{{Script=Hiragana}}]{x}"
    plain = "[A-Za-z]++(?=[ ,])"  # adds nothing to `word`: the usual case, made fast
    no_token = f"{join}(*SKIP)(*FAIL)"  # "____" is no token: step over it at once, not n times
    alternatives = (plain, word, emoji, south_east_asian, single, no_token)
    return regex.compile("|".join(alternatives), regex.V1)


_TOKEN = _compile_token_pattern()


def analyze(text: str) -> list[str]:
    """Return the tokens of a text in order; stop words leave no trace."""
    words = _TOKEN.findall(text)
    longest = max(map(len, words), default=0)
    if longest > MAX_LENGTH // 2:  # any character may be two UTF-16 units
        words = _cut_words(text)
    return [token for token in map(_filter_word, words) if token]


def _cut_words(text: str) -> list[str]:
    """Tokenize a text in which a token may exceed MAX_LENGTH.

    From where a token starts, Lucene's tokenizer sees only that many units.
    """
    words = []
    position = 0
    while position < len(text):
        # A search without a horizon would look at all the rest for each cut: quadratic.
        horizon = position + 4 * MAX_LENGTH
        match = _TOKEN.search(text, position, horizon)
        is_last = horizon >= len(text)
        if not match and is_last:
            break
        # A match near the horizon did not see as much as it may: search on from before it.
        if not match or (match.start() > horizon - MAX_LENGTH and not is_last):
            position = horizon - MAX_LENGTH
            continue

        # Match once more, only MAX_LENGTH units far. None: nothing but "_" as far as it sees.
        start = match.start()
        position = start + 1
        match = _TOKEN.match(text, start, _find_window_end(text, start))
        if match:
            words.append(match[0])
            position = match.end()
    return words


def _find_window_end(text: str, start: int) -> int:
    """Return where MAX_LENGTH UTF-16 units from start end; no half of a surrogate pair counts."""
    window = text[start : start + MAX_LENGTH]
    utf16 = window.encode("utf-16-le", "replace")[: 2 * MAX_LENGTH]
    return start + len(utf16.decode("utf-16-le", "ignore"))


# a corpus repeats its words; bounded, since a policy may write any number of new ones
@lru_cache(maxsize=1 << 18)
def _filter_word(word: str) -> str:
    """Apply possessive, lower case, stop words and Porter to a word; return "" for a stop word."""
    if word[-2:-1] in ("'", "\u2019", "\uff07") and word[-1] in "sS":
        word = word[:-2]
    # Character by character and one for one, as Lucene: no final sigma, and U+0130 becomes a plain
    # i.
    if word.isascii():
        word = word.lower()
    else:
        word = "".join(character.lower()[0] for character in word)
    if word in STOP_WORDS:
        return ""
    return _get_stemmer().stem(word, to_lowercase=False)


@lru_cache(maxsize=None)
def _get_stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer  # here: importing nltk takes most of a second

    # Porter's own later changes, which Lucene has too
    return PorterStemmer(mode=PorterStemmer.MARTIN_EXTENSIONS)
