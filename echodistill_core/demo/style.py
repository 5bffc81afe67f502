"""What a demo's page adds to the style sheet that it shares with the bench's report."""

DEMO_STYLE = """
main { max-width: 960px; }
h1 { overflow-wrap: anywhere; }
.lead { font-size: 1.15rem; margin-top: .8rem; }
.word, .try th b { color: var(--ours); font-weight: 650; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .6rem; }
img { display: block; width: 100%; height: auto; aspect-ratio: 1; border-radius: 6px; }
.try { width: 100%; table-layout: fixed; border-spacing: .5rem; margin: 0 -.5rem; width: calc(100% + 1rem); }
.try th, .try td { padding: 0; border: 0; white-space: normal; background: none; position: static; }
.try thead td { width: 11rem; } .try thead th { font-size: .9rem; color: var(--ink); }
.try tbody th { font-size: .9rem; line-height: 1.35; vertical-align: middle; overflow-wrap: break-word; }
small { display: block; font-size: .78rem; font-weight: 400; color: var(--faint); }
.wide { max-width: 40rem; } .wide + dl { margin-top: 1rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .6rem; }
.curves figure { padding: .6rem .7rem; }
.curves figcaption { font-size: .78rem; margin-bottom: .3rem; }
.curves path, .curves polyline { fill: none; vector-effect: non-scaling-stroke; }
.axis { stroke: var(--line); } .divider { stroke: var(--faint); stroke-dasharray: 3 3; }
.raw { stroke: var(--baseline); stroke-width: .8; opacity: .3; }
.smooth { stroke: var(--baseline); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.raw.stage1, .smooth.stage1 { stroke: var(--ours); }
.curves text { font-size: 10px; fill: var(--faint); text-anchor: end; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem;
  overflow-x: auto; margin: .3rem 0 1.2rem; }
pre code { overflow-wrap: normal; }
@media (max-width: 600px) {
  main { padding: 1.5rem .9rem 3rem; }
  h1 { font-size: 1.6rem; }
  section { margin-top: 2.2rem; }
  .strip { grid-template-columns: repeat(auto-fill, minmax(4.5rem, 1fr)); gap: .4rem; }
  .curves { grid-template-columns: repeat(2, 1fr); }
  .try { display: block; margin: 0; width: 100%; }
  .try thead, .try tbody { display: block; }
  .try tr { display: grid; grid-template-columns: repeat(4, 1fr); gap: .35rem; margin-top: .8rem; }
  .try thead td { display: none; } .try thead th { font-size: .75rem; align-self: end; }
  .try tbody th { grid-column: 1 / -1; }
}
"""
