"""What a figure shows, by its artists."""


def lines_of_axes(axes):
    """The labelled lines of a panel."""
    return {line.get_label(): line for line in axes.lines if line.get_label()[0] != "_"}


def marks_of_axes(axes):
    return [line for line in axes.lines if line.get_linestyle() == "None"]


def by_label(figure):
    return {axes.get_ylabel(): axes for axes in figure.axes}


def texts_of_legend(legend):
    return [text.get_text() for text in legend.get_texts()]


def assert_apart(figure):
    """No panel, label of an axis or legend outside of panels lies on another or off the figure."""
    figure.draw_without_rendering()
    boxes = {f"legend {one}": one.get_window_extent() for one in figure.legends}
    boxes |= {f"text {text.get_text()}": text.get_window_extent() for text in figure.texts}
    for index, axes in enumerate(figure.axes):
        boxes[f"panel {index}"] = axes.get_window_extent()
        boxes[f"x label {index}"] = axes.xaxis.label.get_window_extent()
        boxes[f"y label {index}"] = axes.yaxis.label.get_window_extent()
        boxes[f"title {index}"] = axes.title.get_window_extent()
        if axes.get_legend():
            boxes[f"legend {index}"] = axes.get_legend().get_window_extent()
    boxes = {name: box for name, box in boxes.items() if box.width and box.height}
    names = list(boxes)
    for index, name in enumerate(names):
        box = boxes[name]
        assert min(box.x0, box.y0) >= -1, name
        assert box.x1 <= figure.bbox.width + 1, name
        assert box.y1 <= figure.bbox.height + 1, name
        for other in names[:index]:
            assert not box.overlaps(boxes[other]), (name, other)
