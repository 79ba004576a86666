"""The data report as one HTML page, to be looked at before and after a run.

What comes in are the report's dict, some examples and the eval prompts. What goes out is a
file that needs no network and runs no script, light or dark as the reader's system is. All
text of the data is escaped, and what it means is never said by colour alone.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_sft.data.report import bin_names, facts
from jax_sft.data.token_view import Gap, Piece, pieces, prompt_pieces
from jax_sft.data.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_RUN = 2000  # tokens of one weight that are shown whole
_MAX_PROMPTS = 12
_NUM_TICKS = 6


def write_report_page(
    report: dict[str, Any],
    path: Path,
    *,
    title: str = "What is trained",
    examples: Iterable[Example] = (),
    prompts: Sequence[Sequence[int]] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    problem: str = "",
) -> None:
    """Writes the page, replacing an older one at once.

    Args:
        report: what `run_report` or `data_report` returned.
        path: of the file; its folder exists.
        title: of the page.
        examples: a few to show, each with its tokenizer.
        prompts: the ids of the eval prompts; the first dozen are shown.
        tokenizer: of the prompts.
        problem: why training would refuse this data, shown on top.
    """
    draft = path.with_name(path.name + ".tmp")
    page = report_page(
        report, title=title, examples=examples, prompts=prompts, tokenizer=tokenizer,
        problem=problem,
    )  # fmt: skip
    draft.write_text(page, encoding="utf-8")
    draft.replace(path)


def report_page(
    report: dict[str, Any],
    *,
    title: str,
    examples: Iterable[Example],
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase | None,
    problem: str,
) -> str:
    """The page's text; see `write_report_page`."""
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="problem"><b>Training would stop here.</b> {_text(problem)}</p>'
        if problem
        else "",
        _tiles(report),
        _section("Rows", _sources(report) + _dropped(report)),
        _section("Lengths", _histograms(report) + _longest(report)),
    ]
    shown = [_example(example) for example in examples]
    if shown:
        body.append(_section("Examples", _LEGEND + "".join(shown)))
    if len(prompts):
        body.append(_section("Eval prompts", _prompts(prompts, tokenizer)))
    body.append(_section("All facts", _facts(report)))
    for name, held_out in report.get("eval", {}).items():
        parts = _histograms(held_out) + _facts(held_out) + _dropped(held_out)
        body.append(_section(f"Held out: {name}" if name else "Held out", parts))
    return _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(filter(None, body)))


def _text(value: object) -> str:
    """Text of anyone's, made safe: what is not printable is spelled out, the rest escaped."""
    visible = "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode()
        for c in str(value)
    )
    return html.escape(visible)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>" if content else ""


def _tiles(report: dict[str, Any]) -> str:
    tiles = [
        (f"{report['kept']:,}", f"of {report['rows_read']:,} rows kept"),
        (f"{report['examples']:,}", "examples"),
        (f"{report['tokens']:,}", "tokens an epoch"),
        (f"{report['trained_share']:.1%}", f"trained: {report['trained_tokens']:,} tokens"),
    ]
    if "rows" in report:
        tiles.append((f"{report['packing_efficiency']:.1%}", f"full: {report['rows']:,} rows"))
    if "steps_per_epoch" in report:
        tiles.append((f"{report['steps_per_epoch']:,}", "steps an epoch"))
    cells = (f"<div><b>{value}</b><span>{what}</span></div>" for value, what in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _sources(report: dict[str, Any]) -> str:
    """A bar of fates for each source, with the numbers that it is made of."""
    sources = report["sources"] or [{"name": "all rows", "format": "", "times": 1, **report}]
    bars = []
    for source in sources:
        dropped = sum(source["dropped"].values())
        cut = source["truncated"] + source["split"]
        parts = [
            ("whole", source["kept"] - cut, "kept whole"),
            ("cut", cut, "truncated or split"),
            ("lost", dropped, "dropped"),
        ]
        named = " · ".join(f"{number:,} {what}" for _, number, what in parts if number)
        if source["unrolled"]:
            named += f" · {source['unrolled']:,} unrolled"
        times = "" if source["times"] == 1 else f" × {source['times']:g} an epoch"
        pieces_of_bar = "".join(
            f'<i class="{kind}" style="flex-grow:{number}" title="{number:,} {what}"></i>'
            for kind, number, what in parts
            if number > 0
        )
        bars.append(
            f'<div class="source"><p><b>{_text(source["name"])}</b>'
            f"<small>{_text(source['format'])}{times}</small></p>"
            f'<div class="fates">{pieces_of_bar}</div><p class="quiet">{named or "no rows"}</p>'
            "</div>"
        )
    key = (
        '<p class="key"><span><i class="whole"></i>kept whole</span> '
        '<span><i class="cut"></i>truncated or split</span> '
        '<span><i class="lost"></i>dropped</span></p>'
    )
    return "".join(bars) + key


def _dropped(report: dict[str, Any]) -> str:
    """Each reason with its number, and what was wrong with the first rows."""
    items = []
    for reason, number in report["dropped"].items():
        problems = report["problems"].get(reason, [])
        listed = "".join(f"<li>{_text(problem)}</li>" for problem in problems)
        noun = "row" if number == 1 else "rows"
        items.append(
            f"<dt>{number:,} {noun} dropped: {_text(reason.replace('_', ' '))}</dt>"
            + (f"<dd><ul>{listed}</ul></dd>" if listed else "")
        )
    return f'<dl class="dropped">{"".join(items)}</dl>' if items else ""


def _histograms(report: dict[str, Any]) -> str:
    if not report["examples"]:
        return ""
    return (
        '<div class="plots">'
        + _histogram("Tokens an example", report["length_histogram"], report["lengths"])
        + _histogram(
            "Trained tokens an example", report["trained_histogram"], report["trained_lengths"]
        )
        + "</div>"
    )


def _histogram(title: str, held: dict[str, list[int]], quantiles: dict[str, int]) -> str:
    """Columns as SVG that stretches, beside labels as text that does not.

    A last bin that is wider than the others, the tail, is hollow, and named below.
    """
    edges, counts = held["edges"], held["counts"]
    most, num_bins = max(counts), len(counts)
    has_tail = num_bins > 1 and edges[-1] - edges[-2] > edges[1] - edges[0]
    columns = []
    for index, (name, count) in enumerate(zip(bin_names(edges), counts, strict=True)):
        kind = "tail" if has_tail and index == num_bins - 1 else "bin"
        height = max(100 * count / most, 1.0 if count else 0.0)
        columns.append(
            f'<g><title>{name} tokens: {count:,} examples</title><rect class="{kind}" '
            f'x="{index * 10 + 0.6:.1f}" y="{100 - height:.2f}" width="8.8" height="{height:.2f}"/>'
            f'<rect class="hit" x="{index * 10}" y="0" width="10" height="100"/></g>'
        )
    each = max(-(-num_bins // _NUM_TICKS), 1)
    ticks = "".join(
        f'<span style="left:{100 * index / num_bins:.2f}%">{edges[index]:,}</span>'
        for index in range(0, num_bins, each)
        if index < 0.93 * num_bins  # beyond, the number would stand outside
    )
    named = " · ".join(f"{name} {value:,}" for name, value in quantiles.items())
    tail = f" · hollow: all of {bin_names(edges)[-1]}" if has_tail else ""
    return (
        f'<figure><figcaption>{_text(title)}</figcaption><div class="plot">'
        f'<span class="most">{most:,}</span>'
        f'<svg viewBox="0 0 {num_bins * 10} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{_text(title)}: {named}">{"".join(columns)}</svg>'
        f'<div class="ticks">{ticks}</div></div><p class="quiet">{named}{tail}</p></figure>'
    )


def _longest(report: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_text(row['origin'])}</td><td>{row['tokens']:,}</td></tr>"
        for row in report["longest"]
    )
    head = "<tr><th>the longest examples</th><th>tokens</th></tr>"
    return f'<table class="numbers">{head}{rows}</table>' if rows else ""


def _facts(report: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts(report)
    )
    return f'<table class="facts">{rows}</table>'


def _example(example: Example) -> str:
    num_trained = int((example.weights_T != 0).sum())
    return (
        f'<div class="example"><p><b>{_text(example.origin)}</b><small>'
        f"{len(example.inputs_T):,} tokens, {num_trained:,} trained</small></p>"
        f"{_tokens(pieces(example, longest_run=_LONGEST_RUN))}</div>"
    )


def _prompts(prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        raise ValueError("prompts are shown as tokens, so pass their tokenizer")
    shown = [
        f'<div class="example"><p><b>prompt {index}</b><small>{len(ids):,} tokens</small></p>'
        f"{_tokens(prompt_pieces(ids, tokenizer))}</div>"
        for index, ids in enumerate(prompts[:_MAX_PROMPTS])
    ]
    more = len(prompts) - len(shown)
    return "".join(shown) + (f'<p class="quiet">and {more:,} more</p>' if more else "")


def _tokens(shown: Sequence[Piece | Gap]) -> str:
    """The tokens, each with its id on hover, and below all ids in order."""
    runs, listed = [], []
    for weight, run in itertools.groupby(shown, key=lambda piece: piece.weight):
        run = list(run)
        inside = "".join(map(_token, run))
        ids = " ".join(
            f"… {piece.num_tokens:,} more …"
            if isinstance(piece, Gap)
            else " ".join(map(str, piece.ids))
            for piece in run
        )
        if weight:
            label = "" if weight == 1 else f"<sup>×{weight:g}</sup>"
            inside, ids = f'<span class="trained">{label}{inside}</span>', f"<u>{ids}</u>"
        runs.append(inside)
        listed.append(ids)
    return (
        f'<pre class="tokens">{"".join(runs)}</pre>'
        f"<details><summary>ids</summary><code>{' '.join(listed)}</code></details>"
    )


def _token(piece: Piece | Gap) -> str:
    if isinstance(piece, Gap):
        return f'<span class="gap">… {piece.num_tokens:,} tokens …</span>'
    number = "id" if len(piece.ids) == 1 else "ids"
    hover = f"{number} {' '.join(map(str, piece.ids))}, weight {piece.weight:g}"
    kind = "special" if piece.is_special else "t"
    text = _text(piece.text).replace("\n", "<s>↵</s>\n")
    return f'<span class="{kind}" title="{hover}">{text}</span>'


_LEGEND = (
    '<p class="key"><span><b class="trained">trained</b> in the loss, underlined</span> '
    '<span><b class="t">context</b> seen, not trained</span> '
    '<span><b class="special">special</b> one of the tokenizer\'s own</span> '
    "<span>Hover over a token for its id.</span></p>"
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  --ground: #f6f7f9; --card: #fff; --ink: #1b1f24; --quiet: #5d6672; --line: #dfe3e8;
  --bar: #2f6fb5; --bar-soft: #c3d8ef; --cut: #c98a1b; --lost: #b3403a;
  --trained: #146c43; --trained-ground: #dcf3e4; --special: #7a3e9d; --special-ground: #f3e8f9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #111418; --card: #1a1e24; --ink: #e6e9ed; --quiet: #98a2ae; --line: #2d333b;
    --bar: #5b9be0; --bar-soft: #27425f; --cut: #d9a441; --lost: #e0726b;
    --trained: #7fdca4; --trained-ground: #16382a; --special: #d0a3ec; --special-ground: #35233f;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 28px 16px 64px; }
h1 { font-size: 1.6rem; margin: 0 0 16px; }
h2 { font-size: 1.1rem; margin: 0 0 12px; }
p { margin: 0; }
small, .quiet { color: var(--quiet); font-size: .86rem; }
small { margin-left: 8px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin-top: 16px; }
.problem { background: var(--card); border: 1px solid var(--lost); border-left-width: 6px;
  border-radius: 10px; padding: 12px 16px; margin-bottom: 16px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(145px, 1fr)); gap: 12px; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 16px; }
.tiles b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--quiet); font-size: .86rem; }
.source { margin-bottom: 14px; overflow-wrap: anywhere; }
.fates { display: flex; gap: 2px; height: 18px; margin: 4px 0; border-radius: 5px;
  overflow: hidden; background: var(--line); }
.fates i { flex-basis: 0; min-width: 3px; }
.whole { background: var(--bar); }
.cut { background: repeating-linear-gradient(90deg, var(--cut) 0 4px, transparent 4px 7px); }
.lost { background: repeating-linear-gradient(45deg, var(--lost) 0 3px, transparent 3px 6px); }
.key { color: var(--quiet); font-size: .86rem; margin-bottom: 12px; line-height: 1.9; }
.key > span { display: inline-block; margin-right: 14px; }
.key i { display: inline-block; width: 22px; height: 11px; border-radius: 3px; margin-right: 6px;
  border: 1px solid var(--line); }
.key b { margin-right: 4px; font-weight: 600; }
.dropped { margin: 16px 0 0; }
.dropped dt { font-weight: 600; }
.dropped dd { margin: 0 0 10px; }
.dropped ul { margin: 4px 0; padding-left: 20px; color: var(--quiet); overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr));
  gap: 24px; margin-bottom: 16px; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; }
.plot { position: relative; padding: 16px 0 24px; }
.plot svg { display: block; width: 100%; height: 150px; border-bottom: 1px solid var(--quiet);
  background: linear-gradient(var(--line) 1px, transparent 1px) 0 0 / 100% 50%; }
.most { position: absolute; top: -4px; right: 0; color: var(--quiet); font-size: .8rem; }
.ticks span { position: absolute; bottom: 0; font-size: .8rem; color: var(--quiet);
  font-variant-numeric: tabular-nums; border-left: 1px solid var(--quiet); padding-left: 3px; }
.bin { fill: var(--bar); }
.tail { fill: var(--bar-soft); stroke: var(--bar); vector-effect: non-scaling-stroke; }
.hit { fill: transparent; }
g:hover .hit { fill: var(--ink); fill-opacity: .1; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 6px 12px 6px 0;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
tr:first-child > * { border-top: 0; }
th { font-weight: 600; }
.facts th { width: 11em; color: var(--quiet); font-weight: 500; overflow-wrap: normal; }
.numbers th:last-child, .numbers td:last-child { text-align: right; padding-right: 0; width: 6em; }
.example { margin-top: 18px; overflow-wrap: anywhere; }
.tokens { margin: 6px 0; padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--ground); white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color: var(--quiet); }
.tokens span:hover { outline: 1px solid var(--quiet); }
.t { border-radius: 3px; }
.tokens .t:nth-child(even) { background: color-mix(in srgb, var(--quiet) 9%, transparent); }
.trained { color: var(--trained); font-weight: 600; background: var(--trained-ground);
  border-bottom: 2px solid var(--trained); padding: 1px 0; }
.trained .t:nth-child(even) { background: color-mix(in srgb, var(--trained) 14%, transparent); }
.special { color: var(--special); background: var(--special-ground); border-radius: 4px;
  box-shadow: inset 0 0 0 1px var(--special); padding: 1px 4px; }
.trained sup { color: var(--quiet); font-weight: 400; }
.gap { font-style: italic; }
s { text-decoration: none; opacity: .5; }
details { font-size: .86rem; color: var(--quiet); }
summary { cursor: pointer; width: max-content; }
details code { display: block; padding: 6px 0; overflow-wrap: anywhere; }
details u { font-weight: 600; color: var(--trained); }
"""
