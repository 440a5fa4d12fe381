"""--where: what it means, and that an error points at the word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmsearch.core.errors import InputError, UsageError
from mmsearch.indexing.filters import NO_PLACE, NOT_TAKEN, Condition, Filters
from mmsearch.indexing.remote_image import picture_source
from mmsearch.indexing.vectors import VectorStore
from mmsearch.indexing.where import compile_where


@pytest.mark.parametrize(
    ("text", "expression", "values"),
    [
        ("width >= 2000", "(width >= {w0})", [2000]),
        ("WIDTH = 2 AND NOT height<3", "((width == {w0}) and (not (height < {w1})))", [2, 3]),
        ("size > 1.5MB or size <= 2kib", "((size > {w0}) or (size <= {w1}))", [1_500_000, 2048]),
        ("path like '%/trips/%'", "(path like {w0})", ["%/trips/%"]),
        ('camera != "it\'s"', "(camera != {w0})", ["it's"]),
        ("extension in ['.JPG', 'png']", "(extension in {w0})", [["jpg", "png"]]),
        (
            "taken >= '2023-01-01'",
            f"(taken != {NOT_TAKEN} and taken >= {{w0}})",
            [1672531200],
        ),
        (
            "taken = '2023-01-01'",
            f"(taken != {NOT_TAKEN} and taken >= {{w0}} and taken < {{w1}})",
            [1672531200, 1672617600],
        ),
        ("modified < '2023-01-01 06:00'", "(modified < {w0})", [1672552800]),
        ("latitude < -33.5", f"(latitude != {NO_PLACE} and latitude < {{w0}})", [-33.5]),
        (
            "(width = 1 or width = 2) and height = 3",
            "(((width == {w0}) or (width == {w1})) and (height == {w2}))",
            [1, 2, 3],
        ),
    ],
)
def test_meaning(text, expression, values):
    condition = compile_where(text)
    assert condition.expression == expression
    assert list(condition.values.values()) == values


@pytest.mark.parametrize(
    ("text", "word", "says"),
    [
        ("widht > 5", "widht", "did you mean width"),
        ("width > 5 andd height > 5", "andd", "too many"),
        ("width > 'many'", "'many'", "no number"),
        ("width ~ 5", "~", "means nothing"),
        ("width", "", "the end stands where a comparison"),
        ("(width > 5", "", "where ) should"),
        ("taken > 5", "5", "no date"),
        ("taken > '31.1.2023'", "'31.1.2023'", "no date"),
        ("width like '5%'", "width", "no text"),
        ("extension in 'jpg'", "'jpg'", "where [ should"),
        ("path = /tmp", "/", "means nothing"),
        ("", "", "no field"),
        pytest.param("(" * 3000 + "width > 5", "(", "more than 50 deep", id="brackets"),
        pytest.param("not " * 3000 + "width > 5", "not", "more than 50 deep", id="nots"),
        ("width >= 100000000000000000000000", "1" + "0" * 23, "beyond any number"),
        pytest.param("size < " + "9" * 400, "9" * 400, "beyond any number", id="size"),
        pytest.param("latitude < " + "9" * 400, "9" * 400, "no number of", id="degrees"),
        ("width >= 1e23", "1", "means nothing"),
    ],
)
def test_errors_point_at_the_word(text, word, says):
    with pytest.raises(UsageError) as caught:
        compile_where(text)
    assert says in caught.value.message
    source, pointer = caught.value.message.split("\n")[1:]
    start, length = pointer.index("^"), pointer.count("^")
    assert source[start : start + length] == word or not word


@given(st.text())
def test_no_text_breaks_out_of_its_quotes(text):
    from milvus_lite.search.filter.parser import parse_expr
    from milvus_lite.search.filter.tokens import tokenize

    written = Condition("path == {p}", {"p": text}).inlined()
    tokens = tokenize(written)
    assert [token.value for token in tokens if token.kind.value == "STRING"] == [text]
    parse_expr(written)


@given(st.text(alphabet="width<>=() and or not '\"5,[]like%", max_size=40))
def test_any_text_compiles_or_is_refused(text):
    try:
        compile_where(text)
    except UsageError as error:
        assert error.message.startswith("--where")


def test_filters_combine():
    condition = Filters(min_width=5, orientation="square", where="size > 1").condition()
    assert condition == Condition(
        "(width >= {min_width}) and (shape == 0) and ((size > {w0}))", {"min_width": 5, "w0": 1}
    )
    assert Filters().condition() is None
    with pytest.raises(UsageError, match="diagonal"):
        Filters(orientation="diagonal").condition()
    with pytest.raises(UsageError, match="beyond any picture"):
        Filters(min_width=10**23).condition()


class Server:
    """What of a Milvus client says which version it talks to."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.asked = 0

    def get_server_version(self) -> str:
        self.asked += 1
        return self.version


@pytest.mark.parametrize(
    ("version", "templates"),
    [
        ("v2.4.23", False),
        ("2.3.1", False),
        ("v2.5.4", True),
        ("2.6.0-rc1", True),
        ("2.6-20260404-31fb3fc", True),
        ("unknown-20260608-7ea6e3526", True),
        ("Zilliz Cloud Vector Database(Compatible with Milvus 2.6)", True),
    ],
)
def test_values_travel_apart_wherever_the_server_can_take_them(version, templates):
    store, server = VectorStore("http://localhost", "images", 4), Server(version)
    condition = Condition("width > {w}", {"w": 5})
    for _ in range(2):
        sent = store._filter(server, condition)
        assert ("filter_params" in sent) == templates
        assert sent["filter"] == ("width > {w}" if templates else "width > 5")
    assert server.asked == 1  # once a connection, not once a query


def test_a_text_in_place_of_a_picture_is_the_inputs_fault():
    with pytest.raises(InputError, match="no such picture"):
        picture_source("a red car " * 30)


@pytest.mark.parametrize("url", ["http://localhost/a b.jpg", "http://localhost:port/a.jpg"])
def test_an_address_that_is_none_is_the_inputs_fault(url):
    with pytest.raises(InputError, match="cannot fetch"):
        picture_source(url)
