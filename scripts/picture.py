#!/usr/bin/env python3
"""Draws a terminal's text as an SVG that is readable on light and dark ground.

scripts/record.sh | scripts/picture.py >scripts/session.svg
"""

import html
import sys

COLUMN, ROW, MARGIN = 7.6, 19, 16

STYLE = """text{font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
fill:#24292f;white-space:pre}.typed{font-weight:bold;fill:#0b62a4}rect{fill:#f6f8fa;stroke:#d0d7de}
@media (prefers-color-scheme: dark){
text{fill:#e6edf3}.typed{fill:#6cb6ff}rect{fill:#0d1117;stroke:#30363d}}"""


def svg(lines: list[str]) -> str:
    """The picture as text; what follows a prompt, or stands alone at a line's end, was typed."""
    width = round(max(map(len, lines)) * COLUMN + 2 * MARGIN)
    height = len(lines) * ROW + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        ' aria-label="A session in a terminal">',
        f"<style>{STYLE}</style>",
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
    ]
    for number, line in enumerate(lines):
        if line.startswith("$ "):
            text = f'$ <tspan class="typed">{html.escape(line[2:])}</tspan>'
        elif line.startswith("step ") and line.endswith(" q"):
            text = f'{html.escape(line[:-1])}<tspan class="typed">q</tspan>'
        else:
            text = html.escape(line)
        parts.append(f'<text x="{MARGIN}" y="{MARGIN + ROW * (number + 0.75):g}">{text}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(svg(sys.stdin.read().splitlines()))
