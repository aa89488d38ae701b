"""What the tests of figures read from axes."""


def texts(ax) -> list[str]:
    """What is written among the data."""
    return [text.get_text().strip() for text in ax.texts]


def ticks(axis) -> list[str]:
    """The labels of an axis."""
    return [label.get_text() for label in axis.get_ticklabels()]
