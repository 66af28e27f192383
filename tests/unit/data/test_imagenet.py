import pytest
from timm.data import ImageNetInfo

from scalablevit_pl.data.imagenet import check_imagenet, imagenet_names

INFO = ImageNetInfo()
SYNSETS = list(INFO.label_names())
LEMMAS = [INFO.index_to_description(index) for index in range(1000)]
# Names in the data set on the Hub: those of a ClassLabel must differ.
HUB = [*LEMMAS[:517], "crane2", *LEMMAS[518:]]


def swapped(names: list[str], one: int, other: int) -> list[str]:
    names = list(names)
    names[one], names[other] = names[other], names[one]
    return names


def test_the_names_differ() -> None:
    assert len(set(imagenet_names())) == 1000
    assert imagenet_names()[:2] == ("tench, Tinca tinca", "goldfish, Carassius auratus")


@pytest.mark.parametrize(
    "names",
    [
        SYNSETS,
        LEMMAS,
        HUB,
        list(imagenet_names()),
        [name.split(",")[0] if index not in (264, 639) else name for index, name in enumerate(LEMMAS)],
        [name.upper().replace(" ", "_") for name in LEMMAS],
        [*LEMMAS[:7], "rooster", *LEMMAS[8:]],
    ],
    ids=["synsets", "timm", "hub", "ours", "first lemma", "other letters", "one other name"],
)
def test_every_spelling_becomes_the_same_names(names: list[str]) -> None:
    assert check_imagenet(names) == list(imagenet_names())


@pytest.mark.parametrize("names", [SYNSETS, LEMMAS, HUB], ids=["synsets", "timm", "hub"])
@pytest.mark.parametrize(("one", "other"), [(0, 1), (638, 639), (836, 837), (998, 999)])
def test_two_swapped_classes_are_found(names: list[str], one: int, other: int) -> None:
    with pytest.raises(ValueError, match=f"class {one} of the data is .* where ImageNet has .*{SYNSETS[one]}"):
        check_imagenet(swapped(names, one, other))


@pytest.mark.parametrize("names", [SYNSETS, HUB], ids=["synsets", "hub"])
def test_the_two_cranes_are_distinguished(names: list[str]) -> None:
    with pytest.raises(ValueError, match="class 134 of the data"):
        check_imagenet(swapped(names, 134, 517))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            SYNSETS[:5] + SYNSETS[6:],
            r"999 classes where ImageNet has 1000; 1 are missing, such as n01496331 \(electric",
        ),
        ([str(index) for index in range(1000)], "class 0 of the data is '0' where ImageNet has 'tench"),
        (["cat", "dog"], "2 classes where ImageNet has 1000; the first is 'cat'"),
        (sorted(LEMMAS), "class 0 of the data is 'Afghan hound"),
        (["n00000000", *SYNSETS[1:500], *[f"x{index}" for index in range(500)]], "class 0 of the data is 'n00000000'"),
    ],
    ids=["one missing", "numbers", "pets", "alphabetical", "half unknown"],
)
def test_other_classes_are_rejected(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_imagenet(names)
    assert "--data.class_order null" in str(caught.value)
