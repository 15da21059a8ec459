"""One self-contained HTML page about an adapter: markup, charts in SVG, sections, style. No script, no network."""
