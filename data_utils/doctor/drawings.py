"""Small SVG drawings, in the colours of the page they stand in."""

import numpy as np

WIDTH, HEIGHT = 260, 130
LEFT, RIGHT, TOP, BOTTOM = 50, 6, 8, 16  # margins


def _svg(content: str, height: int = HEIGHT, width: int = WIDTH) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{content}</svg>'


def _frame(low: float, high: float, last: str, width: int = WIDTH, first: str = "0") -> str:
    """Axes, the bounds of the values at the left, and those of the frames below."""
    bottom = HEIGHT - BOTTOM
    return (
        f'<line class="axis" x1="{LEFT}" y1="{TOP}" x2="{LEFT}" y2="{bottom}"/>'
        f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{width - RIGHT}" y2="{bottom}"/>'
        f'<text x="{LEFT - 4}" y="{TOP + 8}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{LEFT - 4}" y="{bottom}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 4}">{first}</text>'
        f'<text x="{width - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{last}</text>'
    )


def curves(tracks: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """Several curves, (frames (P,), values (P,)) each, over each other. What is not finite is left out."""
    tracks = [(frames[np.isfinite(values)], values[np.isfinite(values)]) for frames, values in tracks]
    tracks = [(frames, values) for frames, values in tracks if len(values)]
    if not tracks:
        return _svg("")
    low, high = min(values.min() for _, values in tracks), max(values.max() for _, values in tracks)
    last = max(int(frames[-1]) for frames, _ in tracks)
    content = _frame(low, high, str(last))
    for i, (frames, values) in enumerate(tracks):
        x = LEFT + frames / max(last, 1) * (WIDTH - LEFT - RIGHT)
        share = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
        y = TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
        hue = 200 + 140 * i / max(len(tracks) - 1, 1)  # blue to red, in the order of the episodes
        content += (
            f'<polyline points="{points}" fill="none" stroke="hsl({hue:.0f} 65% 55%)" stroke-width="1.1" '
            'stroke-opacity="0.8"/>'
        )
    return _svg(content)


def bars(values: list[int]) -> str:
    """A histogram of integers."""
    width = 3 * WIDTH
    counts, edges = np.histogram(values, bins=min(40, max(values) - min(values) + 1))
    step = (width - LEFT - RIGHT) / len(counts)
    content = _frame(0, counts.max(), f"{max(values)} frames", width, first=str(min(values)))
    for i, count in enumerate(counts):
        height = count / counts.max() * (HEIGHT - TOP - BOTTOM)
        label = f"{edges[i]:.0f} to {edges[i + 1]:.0f} frames: {count}"
        content += (
            f'<rect class="bar" x="{LEFT + i * step + 0.5:.1f}" y="{HEIGHT - BOTTOM - height:.1f}" '
            f'width="{min(step - 1, 60):.1f}" height="{height:.1f}"><title>{label}</title></rect>'
        )
    return _svg(content, width=width)
