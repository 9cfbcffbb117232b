"""Detokenizers of the evaluation sets: undo the spaces their publishers put around punctuation.

Each is a list of (pattern, replacement) that is applied in order; they give the text the literature evaluates on.
"""

import re
from collections.abc import Callable

_Rules = list[tuple[str, str]]


def _literal(*pairs: tuple[str, str]) -> _Rules:
    return [(re.escape(old), new.replace("\\", r"\\")) for old, new in pairs]


def _inside(opening: str, closing: str, content: str) -> tuple[str, str]:
    """Remove the spaces just inside a pair of delimiters."""
    return rf"{re.escape(opening)}{content}{re.escape(closing)}", rf"{opening}\1{closing}"


_WIKITEXT: _Rules = [
    *_literal(("s '", "s'")),
    (r"/' [0-9]/", r"/'[0-9]/"),
    *_literal((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")),
    *_literal((" : ", ": "), (" ; ", "; "), (" . ", ". "), (" ! ", "! "), (" ? ", "? "), (" , ", ", ")),
    _inside("(", ")", r"\s*([^\)]*?)\s*"),
    _inside("[", "]", r"\s*([^\]]*?)\s*"),
    _inside("{", "}", r"\s*([^}]*?)\s*"),
    _inside('"', '"', r'\s*([^"]*?)\s*'),
    _inside("'", "'", r"\s*([^']*?)\s*"),
    *_literal(("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0")),
    *_literal((" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
]

_PTB: _Rules = [
    *_literal((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/")),
    # a run of N shares its spaces: one pass changes every second one
    *_literal((" N ", " 1 "), (" N ", " 1 ")),
    *_literal(("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")),
]

_LM1B: _Rules = [
    *_literal(("http : / / ", "http://"), ("https : / / ", "https://")),
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "),
    (r" (\w+) \.$", r" \1."),
    *_literal((" ? ", "? ")),
    (r" \?$", "?"),
    *_literal((" ! ", "! ")),
    (r" !$", "!"),
    *_literal((" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/")),
    (r'" ([^"]+) "', r'"\1"'),
    (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
    *_literal(("$ ", "$"), ("\u00a3 ", "\u00a3")),
]


def _lambada(text: str) -> str:
    """Straight quotes for curly double ones, and a newline before the text, without space around it."""
    return "\n" + text.replace("\u201c", '"').replace("\u201d", '"').strip()


def _applying(*rules: _Rules) -> Callable[[str], str]:
    compiled = [(re.compile(pattern), replacement) for part in rules for pattern, replacement in part]

    def detokenize(text: str) -> str:
        for pattern, replacement in compiled:
            text = pattern.sub(replacement, text)
        return text

    return detokenize


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "wikitext": _applying(_WIKITEXT),
    "ptb": _applying(_PTB),
    "lm1b": _applying(_LM1B),
    "lambada": _lambada,
    "scientific_papers": _applying(_WIKITEXT, _LM1B),
}
"""Name of the evaluation set to what undoes its tokenization."""
