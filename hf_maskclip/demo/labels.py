"""From what a visitor types to labels."""

import re

MAX_LABELS = 200  # each is a pass of the text tower
SEPARATORS = ",;\n，；、،"  # of other scripts too
# A label in quotes, which may hold separators, or all that stands before the next one.
LABEL = re.compile(rf'\s*(?:["“”]([^"“”]*)["“”]\s*(?=[{SEPARATORS}]|$)|([^{SEPARATORS}]*))(?:[{SEPARATORS}]|$)')


def parse_labels(text: str) -> list[str]:
    """Labels that are separated by commas, semicolons or new lines, each once. Quotes keep a separator inside a label."""
    found = (" ".join((quoted or plain).split()) for quoted, plain in LABEL.findall(text))
    labels = list(dict.fromkeys(label for label in found if label))
    if len(labels) < 2:
        one = f"only {labels[0]!r}" if labels else "none"
        raise ValueError(f"Labels: there must be at least two, and there is {one}. Separate them by commas or new lines.")
    if len(labels) > MAX_LABELS:
        raise ValueError(f"Labels: there are {len(labels)}, and at most {MAX_LABELS} can be scored here.")
    return labels
