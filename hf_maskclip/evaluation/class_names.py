"""What is wrong with class names that a text encoder reads: equal ones cannot be told apart, and numbers say nothing."""

import logging
import re
from collections.abc import Sequence

logger = logging.getLogger(__name__)

# WordNet's ids (n01440764, with or without a name behind it), numbers, "class 7", Freebase's ids, hashes.
NO_WORD = re.compile(
    r"n\d{8}\b.*|#?\d+(?:[. ,]\d+)*|(?:class|label|category|cls|id)[ _-]*\d+|[cy]_?\d+|/m/\w+|(?=.*\d)(?=.*[a-f])[\da-f]{8,}",
    re.IGNORECASE,
)


def warn_of_names_without_words(class_names: Sequence[str], source: str) -> None:
    """Say in one line which class names are ids or numbers: zero-shot classification by them is at chance."""
    found = [name for name in class_names if NO_WORD.fullmatch(name.strip())]
    if found:
        logger.warning(
            "%s: %d of %d class names are no words, such as %r; zero-shot classification by them means nothing: "
            "give a file of names, one a line, in the order of the classes",
            *(source, len(found), len(class_names), found[0]),
        )


def equal_names(class_names: Sequence[str]) -> dict[str, list[int]]:
    """The names that several classes have, each with the classes' indices."""
    indices: dict[str, list[int]] = {}
    for index, name in enumerate(class_names):
        indices.setdefault(name, []).append(index)
    return {name: found for name, found in indices.items() if len(found) > 1}


def warn_of_equal_names(equal: dict[str, list[int]]) -> None:
    """Say in one line what becomes of classes of one name."""
    if equal:
        listed = ", ".join(f"{name!r} ({', '.join(map(str, found))})" for name, found in equal.items())
        logger.warning(
            "classes of one name get the same scores, of which the first class wins, as in clip_benchmark: %s", listed
        )
