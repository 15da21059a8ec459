"""The page's style: light, dark and print from one set of colours."""

from __future__ import annotations

from collections.abc import Sequence

from lily.html.charts import DEPTH_COLOURS, EXPERT_COLOURS

# A layer's depth, from the first to the last: by way of these, in equal steps. Each stands out from the panel by 3:1.
DEPTH_LIGHT = ((194, 104, 0), (190, 44, 110), (58, 38, 140))
DEPTH_DARK = ((255, 214, 120), (240, 130, 160), (120, 140, 255))


def _ramp(through: Sequence[tuple[int, int, int]]) -> dict[str, str]:
    """`d0` to `d11`, each a colour between two neighbours of those given."""
    out = {}
    for i in range(DEPTH_COLOURS):
        place = i * (len(through) - 1) / (DEPTH_COLOURS - 1)
        at = min(int(place), len(through) - 2)
        mixed = (round(a + (place - at) * (b - a)) for a, b in zip(through[at], through[at + 1], strict=True))
        out[f"d{i}"] = "#" + "".join(f"{channel:02x}" for channel in mixed)
    return out


LIGHT = {
    "bg": "#f6f5f2", "panel": "#ffffff", "ink": "#1b1e23", "muted": "#565d69", "line": "#d6d8dd", "grid": "#e8e9ec",
    "lily": "#6d35a5", "union": "#0b7a75", "lora": "#b4540a", "soft": "#efe8f6",
    "e0": "#7fb2e5", "e1": "#f2b56b", "e2": "#8fcf9f", "e3": "#e59bb6", "e4": "#c5b3e6", "e5": "#d9cf7a",
    "e6": "#9fd3d6", "e7": "#d3b29a", "l0": "#2f6fb0", "l1": "#a8650a", "l2": "#2f7d43", "l3": "#a83f6c",
    "l4": "#6a4fb0", "l5": "#7a6d10", "l6": "#1f7a80", "l7": "#855a38", "inband": "#15181c", **_ramp(DEPTH_LIGHT),
}  # fmt: skip
DARK = {
    "bg": "#121419", "panel": "#1b1e25", "ink": "#e9ebef", "muted": "#a9b0bc", "line": "#3a3f4a", "grid": "#2a2e37",
    "lily": "#c49af0", "union": "#5fd0c9", "lora": "#f2a65a", "soft": "#2a2338",
    "e0": "#3b6ea3", "e1": "#94601d", "e2": "#3c7a4c", "e3": "#96496a", "e4": "#6d57a0", "e5": "#756b22",
    "e6": "#357b80", "e7": "#7c5c43", "l0": "#7fb2e5", "l1": "#f2b56b", "l2": "#8fcf9f", "l3": "#e59bb6",
    "l4": "#c5b3e6", "l5": "#d9cf7a", "l6": "#9fd3d6", "l7": "#d3b29a", "inband": "#ffffff", **_ramp(DEPTH_DARK),
}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


_MARKS = "".join(
    f".curve.{c},.spread.{c},.key.line.{c}{{stroke:var(--{c});border-color:var(--{c})}}"
    f".mark.{c},.band.{c},.fill.{c},.key.box.{c},.key.dot.{c},.key.step.{c}{{fill:var(--{c});background:var(--{c})}}"
    for c in (
        "lily",
        "union",
        "lora",
        *(f"{kind}{i}" for kind in "el" for i in range(EXPERT_COLOURS)),
        *(f"d{i}" for i in range(DEPTH_COLOURS)),
    )
)

CSS = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:36px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:44px 0 8px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:26px 0 8px}figure h3{margin-top:0}
p,figcaption,li{max-width:74ch}
p,figcaption,li,h2,h3,summary{overflow-wrap:anywhere}
.kind{color:var(--muted);margin:0 0 18px}
.lead{font-size:1.08rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:20px 0;
padding:0;list-style:none}
.tiles li{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tiles b{display:block;font-size:1.55rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tiles span{color:var(--muted);font-size:.9rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:16px;margin:14px 0}
figure{margin:14px 0;background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:16px;min-width:0}
.grid figure{margin:0}
figcaption{color:var(--muted);font-size:.92rem;margin-top:8px}
.wide{overflow-x:auto}
.wide svg{min-width:860px}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--ink);font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg .tick{fill:var(--muted);font-size:11px}
svg .label,svg .group{fill:var(--muted);font-size:12px}
svg .group{font-weight:600}
.axis{stroke:var(--line);stroke-width:1.2}
line.grid{stroke:var(--grid);stroke-width:1}
.divider{stroke:var(--line);stroke-dasharray:2 3}
.level{stroke:var(--muted);stroke-dasharray:5 4}
.curve{fill:none;stroke-width:2.2}
.curve.union,.key.line.union{stroke-dasharray:6 4;border-top-style:dashed}
.spread{stroke-width:1.6;opacity:.55}
.band{opacity:.16;stroke:none}
.mark{stroke:var(--panel);stroke-width:1}
.block{fill:var(--soft);stroke:var(--lily);stroke-width:1.2}
svg .inblock{font-weight:600}
svg .inband{fill:var(--inband);font-size:11px}
.unknown{fill-opacity:.45}
svg .incell{font-size:10.5px}
.cell{fill:var(--lily);stroke:var(--line);stroke-width:.6}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:6px 0 0;padding:0;font-size:.9rem}
.legend li{display:flex;align-items:center;gap:7px}
.key{display:inline-block;flex:none}
.key.line{width:26px;border-top:3px solid}
.key.box{width:14px;height:14px;border-radius:3px}
.key.dot{width:11px;height:11px;border-radius:50%}
.key.dot.lora{border-radius:0;transform:rotate(45deg)}
.steps{display:flex}
.key.step{width:9px;height:14px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;margin:6px 0}
caption{text-align:left;color:var(--muted);padding:4px 0;min-width:16em}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--muted);font-weight:600}
tbody th{font-weight:500;white-space:nowrap}
td:not(.number){min-width:13em}
.number{text-align:right}
details{margin-top:8px}
summary{cursor:pointer;color:var(--muted);font-size:.92rem}
summary:focus-visible,.scroll:focus-visible,a:focus-visible{outline:3px solid var(--lily);outline-offset:2px}
.note{border-left:4px solid var(--lora);padding:2px 12px;margin:14px 0;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;font-size:.95rem}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.92em}
footer{color:var(--muted);font-size:.9rem;padding:30px 20px 50px}
nav ol{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;padding:0;margin:0}
a{color:var(--lily)}
@media (max-width:560px){dl{grid-template-columns:1fr}dd{margin-bottom:8px}h1{font-size:1.5rem}figure{padding:12px}}
"""
    + _MARKS
    + ".mark.union,.key.dot.union{fill:none;background:none;stroke:var(--union);stroke-width:2;"
    + "border:2px solid var(--union)}"
    + f"@media print{{:root{{{_variables(LIGHT)}--bg:#fff}}"
    + """body{font-size:11pt}main,header,footer{max-width:none;padding:0}nav,summary{display:none}
figure,tr,.tiles li{break-inside:avoid}h2,h3{break-after:avoid}.scroll,.wide{overflow:visible}.wide svg{min-width:0}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}"""
)
