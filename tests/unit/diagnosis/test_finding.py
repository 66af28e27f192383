from scalablevit_pl.diagnosis.finding import Finding, from_sentence


def test_a_row_fits_into_80_columns_with_its_remedy_on_its_own_lines() -> None:
    row = str(Finding("FAIL", "data", "word " * 40, "do " * 40))
    assert max(map(len, row.splitlines())) <= 80
    assert sum("→" in line for line in row.splitlines()) == 1


def test_the_remedy_follows_the_last_colon_or_semicolon() -> None:
    assert from_sentence("data", "it is broken: repair it") == Finding("FAIL", "data", "it is broken", "repair it")
    assert from_sentence("data", "a: no; repair it") == Finding("FAIL", "data", "a: no", "repair it")
