"""ImageNet-1K's classes in their order, in any spelling."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

# Two classes are called crane. The data set on the Hub requires unique names and numbers the second one.
HUB_SPELLING = {517: "crane2"}


@cache
def _info() -> Any:
    from timm.data.imagenet_info import ImageNetInfo  # slow to import, and most data sets have other classes

    return ImageNetInfo("imagenet-1k")


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """Return the ids of the 1,000 synsets, the names of ImageNet's folders, in the order of the classes."""
    return tuple(_info().label_names())


@cache
def _descriptions() -> tuple[str, ...]:
    return tuple(_info().label_name_to_description(synset) for synset in imagenet_synsets())


@cache
def imagenet_names() -> tuple[str, ...]:
    """Return the names of the 1,000 classes as in converted weights; equal names are followed by the synset."""
    names = _descriptions()
    return tuple(
        f"{name} ({synset})" if names.count(name) > 1 else name
        for name, synset in zip(names, imagenet_synsets(), strict=True)
    )


def check_imagenet(names: Sequence[str]) -> list[str]:
    """Check that classes are ImageNet's in their order, and return their names in this package.

    Accepted are synset ids, timm's WordNet lemmas, and the names of the data set on the Hub. One common lemma is
    enough, and up to one name in fifty may be unknown.
    """
    synsets, canonical = imagenet_synsets(), imagenet_names()
    remedy = "correct the data, or set --data.class_order null if it is not ImageNet"
    if len(names) != len(synsets):
        absent = [synset for synset in synsets if synset not in names]
        example = f", such as {absent[0]} ({canonical[synsets.index(absent[0])]})" if len(absent) < len(synsets) else ""
        what = f"{len(absent)} are missing{example}" if example else f"the first is {(*names, None)[0]!r}"
        raise ValueError(f"the data has {len(names)} classes where ImageNet has {len(synsets)}; {what}: {remedy}")
    spellings, misplaced, unknown = _spellings(), list[int](), list[int]()
    for index, name in enumerate(names):
        places = spellings.get(_plain(name))
        if places and index not in places:
            misplaced.append(index)
        elif not places and not _lemmas(name) & _lemmas(canonical[index]):
            unknown.append(index)
    if not misplaced and len(unknown) <= len(names) // 50:
        return list(canonical)
    first = (misplaced or unknown)[0]
    raise ValueError(
        f"class {first} of the data is {names[first]!r} where ImageNet has {canonical[first]!r} ({synsets[first]}): "
        f"{remedy}"
    )


@cache
def _spellings() -> dict[str, set[int]]:
    places: dict[str, set[int]] = {}
    for index, spellings in enumerate(zip(imagenet_synsets(), imagenet_names(), _descriptions(), strict=True)):
        for spelling in {*spellings, HUB_SPELLING.get(index, "")} - {""}:
            places.setdefault(_plain(spelling), set()).add(index)
    return places


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_]+", name.strip().lower()))


def _lemmas(name: str) -> set[str]:
    return {_plain(lemma) for lemma in name.split(",")}
