"""The frame of an HTML page and its style sheet: the report's and, with a few rules more, the demo's."""

import html

STYLE = """
:root {
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d1f24; --faint: #6b6f78; --line: #dedbd3;
  --ours: #b8410f; --baseline: #2763a8; --variant: #8a8577; --reference: #3b8257;
  --yes: #1f7a45; --nearly: #946200; --no: #b3261e; --tint: #fdf1ea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171b; --card: #1c1f25; --ink: #e8e6e1; --faint: #9a9da5; --line: #343841;
    --ours: #ff9057; --baseline: #7db4f2; --variant: #a29d90; --reference: #77c796;
    --yes: #6fce93; --nearly: #e3b455; --no: #ff8a80; --tint: #2b211c;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 2.1rem; line-height: 1.15; letter-spacing: -0.02em; margin: 0; text-wrap: balance; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; margin: 0 0 .5rem; }
section { margin-top: 3rem; }
p { max-width: 72ch; margin: .4rem 0 .8rem; }
.meta, .none, figcaption { color: var(--faint); }
code { font: .9em ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: .75rem; margin-top: 1.5rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: .8rem; line-height: 1.35; color: var(--faint); }
.tile.yes b { color: var(--yes); } .tile.nearly b { color: var(--nearly); } .tile.no b { color: var(--no); }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .875rem; }
th, td { padding: .42rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { font-weight: 600; font-size: .78rem; color: var(--faint); vertical-align: bottom; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--card); z-index: 1; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
td.p { color: var(--faint); } .p { padding-left: 0; }
tr.ours > * { background: var(--tint); } tr.ours > th { font-weight: 650; }
tr.absent > *, tr.reference > * { color: var(--faint); }
.badge { display: inline-block; font-size: .78rem; padding: .05rem .45rem; border-radius: 99px;
  border: 1px solid currentColor; }
.yes { color: var(--yes); } .nearly { color: var(--nearly); } .no { color: var(--no); }
.unknown { color: var(--faint); }
.tile.yes, .tile.nearly, .tile.no, .tile.unknown { color: inherit; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
.plots.large { grid-template-columns: 1fr; }
figure { margin: 0; padding: .9rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  --paper: var(--card); }
figcaption { font-size: .85rem; font-weight: 600; }
figure svg { display: block; width: 100%; height: auto; margin: 0 auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif !important; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; font-size: .85rem; color: var(--faint); }
.key i { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .4rem; }
.key .ours i { background: var(--ours); } .key .baseline i { background: var(--baseline); border-radius: 1px; }
.key .variant i { background: var(--variant); scale: .75; }
.key .reference i { background: var(--reference); border-radius: 0; rotate: 45deg; scale: .8; }
.grid table { width: auto; }
.grid th { max-width: 15rem; white-space: normal; } .grid td { padding: .3rem; }
.grid img { display: block; width: 15rem; height: auto; border-radius: 6px; }
.none { font-size: .8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.2rem; margin: 0; font-size: .9rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 600px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
@media print { .wide { overflow: visible; } section { break-inside: avoid-page; } }
"""


def document(title: str, body: str, *, more_style: str = "") -> str:
    """A whole page as HTML text that needs nothing else: no scripts, light and dark, wide and narrow.

    title: as text; body: as HTML. more_style: rules after STYLE's.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}{more_style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
