"""Each evaluation set's text as the literature evaluates on it; other quotes and spaces stay what they are.

The seven sets: wikitext, ptb, lm1b, lambada and pubmed, arxiv (scientific_papers) have a detokenizer, ag_news has none.
"""

import pytest

from bd3lm_scale.data.detokenize import DETOKENIZERS

CURLY = "\u201c It \u2019s \u2018 N \u2019 \u201d , he said , \u201c 2 @,@ 000 \u201d ; ( the \u201990s ) 's end . "
STRAIGHT = "= = A = = \n \" It 's \" , N $ 1 ( a ) [ b ] , the boys ' n't \\/ <unk> . http : / / x 5 \u00b0 C ?"
SPACES = " \u00a0\u2009 one\u2028two \u3000"
EXPECTED = {
    "wikitext": (
        "\u201c It \u2019s \u2018 1 \u2019 \u201d, he said, \u201c 2,000 \u201d; (the \u201990s)'s end. ",
        "== A ==\n\"It's\", 1 $ 1 (a) [b], the boys' n't \\/ <unk>. http: / / x 5\u00b0C ?",
        " \u00a0\u2009 one\u2028two \u3000",
    ),
    "ptb": (
        "\u201c It \u2019s \u2018 1 \u2019 \u201d , he said , \u201c 2 @,@ 000 \u201d ; ( the \u201990s )'s end . ",
        "= = A = =\n\" It's \" , 1 $1 ( a ) [ b ] , the boys'n't / ? . http : / / x 5 \u00b0 C ?",
        " \u00a0\u2009 one\u2028two \u3000",
    ),
    "lm1b": (
        "\u201c It \u2019s \u2018 N \u2019 \u201d, he said, \u201c 2 @,@ 000 \u201d; (the \u201990s)'s end. ",
        "= = A = = \n \"It's\", N $1 (a) [b], the boys ' n't \\/ <unk> . http://x 5 \u00b0 C?",
        " \u00a0\u2009 one\u2028two \u3000",
    ),
    "lambada": (
        '\n" It \u2019s \u2018 N \u2019 " , he said , " 2 @,@ 000 " ; ( the \u201990s ) \'s end .',
        "\n" + STRAIGHT,
        "\none\u2028two",
    ),
    "scientific_papers": (
        "\u201c It \u2019s \u2018 1 \u2019 \u201d, he said, \u201c 2,000 \u201d; (the \u201990s)'s end. ",
        "== A ==\n\"It's\", 1 $1 (a) [b], the boys' n't \\/ <unk>. http:// x 5\u00b0C?",
        " \u00a0\u2009 one\u2028two \u3000",
    ),
}


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_detokenized_texts(name):
    assert tuple(DETOKENIZERS[name](text) for text in (CURLY, STRAIGHT, SPACES)) == EXPECTED[name]


def test_lambada_has_straight_quotes_and_no_space_around():
    assert DETOKENIZERS["lambada"]("\u201cHello\u201d she said.  \n") == '\n"Hello" she said.'
