"""Whether a reader can read a figure."""

from matplotlib.text import Text


def check_readable(figure, monkeypatch):
    """Fails if a legend covers axes, or a text is small, leaves the figure, or overlaps another one."""
    drawn, draw = [], Text.draw
    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", lambda text, renderer: drawn.append(text) or draw(text, renderer))
        figure.canvas.draw()
    texts = [text for text in drawn if text.get_visible() and text.get_text().strip()]
    assert len(texts) > 5
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    width, height = figure.bbox.size
    for text, (content, box) in zip(texts, boxes, strict=True):
        assert text.get_fontsize() >= 7, content
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, content
    for number, (content, box) in enumerate(boxes):
        crossed = [other for other, own in boxes[:number] if box.overlaps(own)]
        assert not crossed, (content, crossed)
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    for legend in legends:
        assert not any(legend.get_window_extent().overlaps(axes.bbox) for axes in figure.axes)
