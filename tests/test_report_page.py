"""The report's page is one safe file: every text escaped, no script, nothing fetched."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from small_tokenizers import packaged_bytes
from test_report import example_set, two_sources

from jax_sft.data.report import data_report, run_report
from jax_sft.data.report_page import write_report_page
from jax_sft.data.types import Counts, Example, Source

EVIL = "<script>alert('x')</script>&amp;\x00\ud800"
VOID = {"meta"}


class Page(HTMLParser):
    """Checks that tags close as they open, and holds what there is."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def page_of(tmp_path, report, **given):
    path = tmp_path / "data_report.html"
    write_report_page(report, path, **given)
    assert list(tmp_path.iterdir()) == [path]
    return path.read_text(encoding="utf-8")


def example(context, trained, *, origin="row 0", weight=1.0):
    ids = packaged_bytes()(context + trained)["input_ids"]
    weights = [0.0] * len(context.encode()) + [weight] * len(trained.encode())
    ids = np.array(ids, np.int32)
    return Example(ids[:-1], ids[1:], np.array(weights[1:], np.float32), packaged_bytes(), origin)


def test_it_shows_rows_lengths_examples_and_prompts(tmp_path):
    report = run_report(two_sources(), {"": example_set([1]), "law": example_set([1])})
    ids = packaged_bytes()("Q: é\n")["input_ids"]
    text = page_of(
        tmp_path,
        report,
        title="A run",
        examples=[example("ab", "cd", weight=0.5)],
        prompts=[ids] * 14,
        tokenizer=packaged_bytes(),
    )
    page = Page(text)
    for words in (
        "A run",
        "of 5 rows kept",
        "1 kept whole · 1 truncated or split · 2 dropped",
        "× 2 an epoch",
        "2 rows dropped: empty output",
        "pairs.jsonl line 3: its output is empty",
        "Held out: law",
        "4 tokens: 1 examples",
        "×0.5",
        " ".join(map(str, ids)),
        "and 2 more",
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == 6
    assert f'title="id {packaged_bytes()("a")["input_ids"][0]}, weight 0"' in text
    trained = re.search(r'<span class="trained">(.*?)</pre>', text)[1]
    assert re.sub("<.*?>", "", trained) == "×0.5cd"


def test_every_text_is_escaped(tmp_path):
    counts = Counts(rows_read=2, kept=1, dropped={EVIL: 1}, shown={EVIL: [EVIL]})
    counts.stop_tokens, counts.untruncated_answers = {EVIL: 1}, 1
    given = example_set(
        [1], counts=counts, sources=[Source(EVIL, EVIL, 1.0, counts)], origins=[EVIL]
    )
    text = page_of(
        tmp_path,
        run_report(given, {EVIL: given}),
        title=EVIL,
        examples=[example(EVIL[:-1], EVIL[:-1], origin=EVIL)],
        prompts=[packaged_bytes()(EVIL[:-1])["input_ids"]],
        tokenizer=packaged_bytes(),
        problem=EVIL,
    )
    assert "\x00" not in text and "script" not in Page(text).tags
    assert Page(text).text.count("<script>") > 10


def test_nothing_is_fetched_and_no_script_may_run(tmp_path):
    text = page_of(tmp_path, data_report(two_sources()))
    assert "http://" not in text and "https://" not in text and "url(" not in text
    names = {name for _, name, _ in Page(text).attributes}
    assert not names & {"src", "href", "onload", "onerror", "onclick"}
    assert "default-src 'none'; style-src 'unsafe-inline'" in text


def test_a_problem_stands_on_top(tmp_path):
    text = Page(page_of(tmp_path, data_report(two_sources()), problem="no stop")).text
    assert text.index("Training would stop here. no stop") < text.index("rows kept")
    assert "would stop here" not in page_of(tmp_path, data_report(two_sources()))


def test_no_examples_still_make_a_page(tmp_path):
    counts = Counts()
    counts.drop("over_length", 2)
    page = Page(page_of(tmp_path, data_report(example_set(counts=counts))))
    assert "2 rows dropped: over length" in page.text and "svg" not in page.tags


def test_prompts_need_their_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="pass their tokenizer"):
        write_report_page(data_report(two_sources()), tmp_path / "a.html", prompts=[[1]])
