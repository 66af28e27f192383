from scalablevit_pl.diagnosis import data


def test_a_sample_is_spread_over_all_images() -> None:
    assert list(data.spread(10, 4)) == [0, 3, 6, 9]
    assert list(data.spread(3, 4)) == [0, 1, 2]
    assert list(data.spread(5, 1)) == [0]


def test_a_class_without_images_is_a_warning() -> None:
    finding = data.check_histogram("val", [0, 0, 2], ["cat", "dog", "owl"])
    assert (finding.status, finding.text) == ("warn", "1 of 3 classes have no images: dog")
    assert "raise --data.val_fraction" in finding.remedy
    assert "val_fraction" not in data.check_histogram("train", [0, 0, 2], ["cat", "dog", "owl"]).remedy
    finding = data.check_histogram("val", [0, 0, 2, 1], ["cat", "dog", "owl"])
    assert (finding.status, finding.text) == ("ok", "1 to 2 images in each of the 3 classes")
