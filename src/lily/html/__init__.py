"""Parts of self-contained HTML pages: markup, charts in SVG, style. Knows nothing of Lily; no script, no network."""
