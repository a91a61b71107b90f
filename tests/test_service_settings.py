"""Settings of services: every place they come from, which one counts, what is remembered, and what nobody sees."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import enum
import logging
import pickle
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Literal, TypedDict

import msgspec
import pytest

import segue
from segue.worker.services.declaration import declare
from segue.worker.services.errors import VerbError
from segue.worker.services.options import Place, resolve

PATIENT_S = 20.0
HIDDEN = "hunter2-hunter2"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no settings file lies."""
    monkeypatch.chdir(tmp_path)


def run(work: Coroutine[Any, Any, Any]) -> None:
    asyncio.run(asyncio.wait_for(work, PATIENT_S))


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Plain(msgspec.Struct, frozen=True):
    text: str = "default"
    number: int = 1
    ratio: float = 0.5
    switch: bool = False
    colour: Colour = Colour.RED
    level: Literal["low", "high"] = "low"
    names: list[str] = []
    weights: dict[str, float] = {}
    either: int | None = None
    path: Path = Path("/")
    token: segue.Secret = segue.Secret("")


class Typed(TypedDict, total=False):
    number: int
    text: str


@dataclasses.dataclass
class Data:
    text: str = "default"
    number: int = 1
    derived: int = dataclasses.field(init=False, default=3)


class Renamed(msgspec.Struct, rename="camel"):
    per_euro: float = 1.0


def settle(
    place: Place | None = None,
    base: Any = None,
    choices: dict[str, str] | None = None,
    query: dict[str, str] | None = None,
    kind: type = Plain,
) -> Any:
    """What a service called x gets."""
    declaration = declare("x", lambda settings: settings, (), settings=kind)
    return resolve(declaration, place or Place(environ={}), base, choices or {}, query)


def failing(message: str, **more: Any) -> str:
    with pytest.raises(segue.OptionsError, match=message) as caught:
        settle(**more)
    error: BaseException | None = caught.value
    text = ""
    while error is not None:  # whatever a traceback shows
        text += f"{error!r} {error}\n"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return text


# ------------------------------------------------------------------------------------------------ which one counts


def test_each_place_counts_more_than_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "segue.toml"
    file.write_text("[services.x]\n")
    env_file = tmp_path / ".env"
    env_file.write_text("")
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    place = Place(str(file), str(env_file), environ)
    assert settle(place).settings.text == "default"
    base = Plain(text="before", number=5)
    assert settle(place, base, {}, {}).settings == base
    (credentials / "x.text").write_text("credential\n")
    assert settle(place, base, {}, {}).settings.text == "credential"
    file.write_text("[services.x]\ntext = 'file'\n")
    assert settle(place, base, {}, {}).settings.text == "file"
    env_file.write_text("SEGUE_SERVICES__X__TEXT=env-file\n")
    assert settle(place, base, {}, {}).settings.text == "env-file"
    environ["SEGUE_SERVICES__X__TEXT"] = "environment"
    assert settle(place, base, {}, {}).settings.text == "environment"
    assert settle(place, base, {"text": "chosen"}, None).settings.text == "chosen"
    said = settle(place, base, {"text": "chosen"}, {"text": "said"})
    assert (said.settings.text, said.settings.number) == ("said", 5)
    assert said.choices == {"text": "said"}


def test_a_swap_drops_what_was_chosen_where_file_or_environment_say_something_themselves() -> None:
    place = Place(environ={"SEGUE_SERVICES__X__TEXT": "environment"})
    chosen = {"text": "chosen", "number": "7", "gone": "1"}
    start = settle(place, None, chosen, None)
    assert (start.settings.text, start.choices) == ("chosen", {"text": "chosen", "number": "7"})
    swap = settle(place, None, chosen, {})
    assert (swap.settings.text, swap.settings.number) == ("environment", 7)
    assert swap.choices == {"number": "7"}


def test_pyproject_has_the_same_sections_below_tool_segue(tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text("[tool.other]\n")
    assert settle(Place(str(file), environ={})).settings == Plain()
    file.write_text("[tool.segue.services.x]\nnumber = 4\n")
    assert settle(Place(str(file), environ={})).settings.number == 4
    file.write_text("tool = 3\n")
    assert settle(Place(str(file), environ={})).settings == Plain()


def test_alone_under_uvicorn_the_file_is_found_where_segue_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> list[str]:
        services = segue.Services()
        x = services.declare("x", lambda settings: settings, settings=Plain)
        async with services:
            seen = [x.current.text]
            for path in tmp_path.glob("*.toml"):
                path.write_text(path.read_text().replace("first", "second"))
            await services.reload("x")
            return [*seen, x.current.text]

    (tmp_path / "pyproject.toml").write_text("[tool.segue.services.x]\ntext = 'first pyproject'\n")
    assert asyncio.run(work()) == ["first pyproject", "second pyproject"]
    (tmp_path / "segue.toml").write_text("[services.x]\ntext = 'first segue'\n")
    assert asyncio.run(work()) == ["first segue", "second segue"]
    (tmp_path / "other.toml").write_text("[services.x]\ntext = 'first other'\n")
    monkeypatch.setenv("SEGUE_CONFIG", "other.toml")
    assert asyncio.run(work()) == ["first other", "second other"]
    monkeypatch.setenv("SEGUE_SERVICES__X__TEXT", "environment")
    assert asyncio.run(work()) == ["environment", "environment"]


def test_the_instance_says_itself_what_its_settings_are_if_they_are_of_that_type() -> None:
    class Own:
        def __init__(self, settings: Plain) -> None:
            self.settings: Any = settings

    class Odd:
        @property
        def settings(self) -> Plain:
            raise RuntimeError("odd")

    async def work() -> None:
        services = segue.Services()
        own = services.declare("own", Own, settings=Plain)
        typed = services.declare("typed", Own, settings=Typed)
        services.declare("odd", Odd, settings=Plain)
        services.declare("none", Own)
        async with services:
            own.current.settings = Plain(text="changed", names=["a"], path=Path("/x"))
            await services.reload("own", number="3")
            assert own.current.settings == Plain(text="changed", number=3, names=["a"], path=Path("/x"))
            own.current.settings = {"text": "of another type"}
            await services.reload("own")
            assert own.current.settings.text == "changed"
            assert own.current.settings.number == 3
            await services.reload("typed", number="3")
            await services.reload("typed", text="t")
            assert typed.current.settings == {"number": 3, "text": "t"}
            await services.reload("odd")
            await services.reload("none")

    run(work())


# ------------------------------------------------------------------------------------------------------------ types


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("number", "-12", -12),
        ("ratio", "1e3", 1000.0),
        ("switch", "true", True),
        ("switch", "0", False),
        ("colour", "blue", Colour.BLUE),
        ("level", "high", "high"),
        ("names", '["a", "b"]', ["a", "b"]),
        ("names", "[]", []),
        ("weights", '{"a": 1}', {"a": 1.0}),
        ("either", "4", 4),
        ("either", "null", None),
        ("path", "/etc", Path("/etc")),
        ("token", "[not json", segue.Secret("[not json")),
        ("token", '["json"]', segue.Secret('["json"]')),
        ("text", '{"a": 1}', '{"a": 1}'),
        ("text", "5", "5"),
        ("text", "null", "null"),
        ("text", "", ""),
    ],
)
def test_text_becomes_what_the_type_asks_for(key: str, text: str, value: Any) -> None:
    for resolved in (
        settle(query={key: text}),
        settle(choices={key: text}),
        settle(Place(environ={f"SEGUE_SERVICES__X__{key.upper()}": text})),
    ):
        assert getattr(resolved.settings, key) == value
        again = settle(base=resolved.settings, query={})
        assert again.settings == resolved.settings
        assert again.digest == resolved.digest


def test_a_file_has_values_of_types_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "segue.toml"
    file.write_text("[services.x]\nnames = ['a']\nswitch = true\nratio = 2\n[services.x.weights]\nb = 1.5\n")
    settings = settle(Place(str(file), environ={})).settings
    assert settings == Plain(names=["a"], switch=True, ratio=2.0, weights={"b": 1.5})


def test_structs_dataclasses_and_typed_dicts_are_alike() -> None:
    query = {"number": "4"}
    assert settle(query=query, kind=Data).settings == Data(number=4)
    assert settle(base=Data(text="b"), query=query, kind=Data).settings == Data("b", 4)
    assert settle(query=query, kind=Typed).settings == {"number": 4}
    assert settle(base={"text": "b"}, query=query, kind=Typed).settings == {"text": "b", "number": 4}
    failing("takes no derived; it takes number, text", query={"derived": "4"}, kind=Data)


def test_a_struct_that_renames_its_fields_is_set_by_their_names_in_the_code() -> None:
    assert settle(query={"per_euro": "2"}, kind=Renamed).settings.per_euro == 2.0
    assert settle(base=Renamed(3.0), query={}, kind=Renamed).settings.per_euro == 3.0
    failing(r"per_euro \(this swap\): Expected `float`", query={"per_euro": "x"}, kind=Renamed)


def test_the_digest_is_the_same_if_and_only_if_the_settings_are() -> None:
    one = settle(query={"weights": '{"a": 1, "b": 2}', "token": HIDDEN})
    other = settle(query={"weights": '{"b": 2, "a": 1}', "token": HIDDEN})
    different = settle(query={"weights": '{"b": 2, "a": 1}', "token": HIDDEN + "x"})
    assert one.digest == other.digest != different.digest
    assert HIDDEN not in one.digest


def test_options_are_for_one_swap_and_a_start_has_their_defaults_or_none() -> None:
    class Needed(msgspec.Struct):
        target: str

    class Optional(msgspec.Struct):
        loudly: bool = False

    needed = declare("x", lambda options: options, (), options=Needed)
    place = Place(environ={})
    assert resolve(needed, place, None, {}, None).options is None
    with pytest.raises(segue.OptionsError, match="missing required field `target`"):
        resolve(needed, place, None, {}, {})
    assert resolve(needed, place, None, {}, {"target": "t"}).options == Needed("t")
    optional = declare("x", lambda options: options, (), options=Optional)
    assert resolve(optional, place, None, {}, None).options == Optional()
    with pytest.raises(segue.DeclarationError, match="text is a setting and an option"):
        declare("x", lambda: None, (), settings=Plain, options=Data)


# -------------------------------------------------------------------------------------------- files and credentials


def test_a_value_may_stand_in_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "token").write_text(f" {HIDDEN} \n")
    (tmp_path / "segue.toml").write_text("[services.x]\ntoken-file = 'secrets/token'\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    place = Place(str(tmp_path / "segue.toml"), environ={})
    assert settle(place).settings.token.reveal() == f" {HIDDEN} "  # the newline alone is no part of it
    environ = {"SEGUE_SERVICES__X__TOKEN_FILE": "../secrets/token"}
    assert settle(Place(environ=environ)).settings.token.reveal() == f" {HIDDEN} "
    (tmp_path / "secrets" / "token").write_text("rotated")
    assert settle(place).settings.token.reveal() == "rotated"


def test_a_setting_whose_own_name_ends_with_file_is_what_it_says() -> None:
    class Tls(msgspec.Struct):
        cert_file: str = ""
        cert: str = ""

    class OnlyFile(msgspec.Struct):
        log_file: str = ""

    place = Place(environ={"SEGUE_SERVICES__X__CERT_FILE": "/nowhere", "SEGUE_SERVICES__X__LOG_FILE": "/log"})
    assert settle(Place(environ={"SEGUE_SERVICES__X__LOG_FILE": "/log"}), kind=OnlyFile).settings.log_file
    assert (
        settle(
            Place(environ={k: v for k, v in place.environ.items() if "CERT" in k}), kind=Tls
        ).settings.cert_file
        == "/nowhere"
    )


def test_what_goes_wrong_with_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe" + HIDDEN.encode())

    def environ(**values: str) -> Place:
        return Place(environ={f"SEGUE_SERVICES__X__{key}": value for key, value in values.items()})

    text = failing(
        r"SEGUE_SERVICES__X__TOKEN_FILE: .*binary can't be read: it isn't UTF-8",
        place=environ(TOKEN_FILE="binary"),
    )
    assert HIDDEN not in text
    failing("TOKEN_FILE: .*nowhere can't be read: No such file", place=environ(TOKEN_FILE="nowhere"))
    failing(
        "TOKEN_FILE: token is given as well; one of them",
        place=environ(TOKEN_FILE="binary", TOKEN=HIDDEN),
    )
    file = tmp_path / "segue.toml"
    for content, message in (
        (f"token = '{HIDDEN}", "segue.toml can't be read"),
        ("services = 3", "a table of tables"),
        ("[services]\nx = 3", "a table of tables"),
        ("[services.x]\ntoken_file = 3", "services.x.token_file: it is the path of a file"),
        (f"[services.x]\ntokn = '{HIDDEN}'", r"'x' has no setting tokn \(.*segue.toml: services.x.tokn\)"),
    ):
        file.write_text(content)
        assert HIDDEN not in failing(message, place=Place(str(file), environ={}))
    file.write_bytes(b"\xff" + HIDDEN.encode())
    assert HIDDEN not in failing("it isn't UTF-8", place=Place(str(file), environ={}))
    failing("can't be read: No such file", place=Place(str(tmp_path / "none.toml"), environ={}))
    failing("can't be read: No such file", place=Place(None, str(tmp_path / "none.env"), {}))
    failing("can't be read: it isn't UTF-8", place=Place(None, str(tmp_path / "binary"), {}))


def test_credentials_of_others_are_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "x.unknown").write_text("other")
    (tmp_path / "y.text").write_text("other")
    (tmp_path / "x.token").write_text(HIDDEN)
    settings = settle(Place(environ={"CREDENTIALS_DIRECTORY": str(tmp_path)})).settings
    assert settings == Plain(token=segue.Secret(HIDDEN))
    assert settle(Place(environ={"CREDENTIALS_DIRECTORY": str(tmp_path / "none")})).settings == Plain()


# ------------------------------------------------------------------------------------------------------ refusals


def test_what_no_service_takes_is_named_with_its_place() -> None:
    failing("'x' takes no nonsense; it takes colour, either", query={"nonsense": "1"})
    failing(
        r"has no setting numbr \(environment SEGUE_SERVICES__X__NUMBR\); it has",
        place=Place(environ={"SEGUE_SERVICES__X__NUMBR": "1"}),
    )


def test_a_service_without_settings_refuses_what_file_or_environment_say() -> None:
    declaration = declare("x", lambda: None, ())
    place = Place(environ={"SEGUE_SERVICES__X__TEXT": "1"})
    with pytest.raises(segue.OptionsError, match="has no setting text"):
        resolve(declaration, place, None, {}, None)


def test_a_section_of_no_service_fails_the_start(tmp_path: Path) -> None:
    (tmp_path / "segue.toml").write_text("[services.typo]\n")

    async def work() -> None:
        services = segue.Services()
        services.declare("x", lambda: None)
        with pytest.raises(segue.OptionsError, match=r"services\.typo: no such service; declared: x"):
            await services.__aenter__()

    run(work())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("number", "str", r"number \(this swap\): Expected `int`, got `str`"),
        ("number", HIDDEN, r"number \(this swap\): Expected `int`, got `str`"),
        ("colour", HIDDEN, r"colour \(this swap\): it is one of red, blue"),
        ("level", f"{HIDDEN}' - at `$.x`", r"level \(this swap\): it is one of low, high"),
        ("names", f'["a", {HIDDEN}]', r"names \(this swap\): Expected `array`"),
        ("names", f'["{HIDDEN}", 3]', r"names \(this swap\): Expected `str`, got `int`"),
        ("weights", f'{{"a": "{HIDDEN}"}}', r"weights \(this swap\): Expected `float`"),
    ],
)
def test_no_message_has_a_value_in_it(key: str, value: str, message: str) -> None:
    assert HIDDEN not in failing(message, query={key: value})


def test_what_a_type_says_of_its_values_is_told_without_them() -> None:
    class Picky(msgspec.Struct):
        url: str = ""
        token: segue.Secret = segue.Secret("")
        tiny: str = ""

        def __post_init__(self) -> None:
            raise ValueError(
                f"url {self.url!r} with {self.token.reveal()} is bad,\nso is {self.tiny} in a trice"
            )

    text = failing(
        "url .*is bad, so is .* trice",
        base=None,
        query={"url": "http://me:pw@host", "token": HIDDEN, "tiny": "a"},
        kind=Picky,
    )
    assert HIDDEN not in text
    assert "pw" not in text
    assert "so is ******** in ******** trice" in text


def test_secrets_show_nowhere() -> None:
    secret = segue.Secret(HIDDEN)
    settings = Plain(token=secret)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r:>40}", repr(settings), f"{[secret]}"]
    assert not [text for text in shown if HIDDEN in text]
    assert "********" in repr(settings)
    assert secret == segue.Secret(HIDDEN) == copy.deepcopy(secret) == pickle.loads(pickle.dumps(secret))
    assert secret != HIDDEN
    assert hash(secret) == hash(segue.Secret(HIDDEN))
    assert (bool(secret), bool(segue.Secret(""))) == (True, False)
    with pytest.raises(TypeError):
        msgspec.json.encode(settings)
    assert HIDDEN not in repr(dataclasses.asdict(_Holder(secret)))


@dataclasses.dataclass
class _Holder:
    secret: segue.Secret


@pytest.mark.parametrize("where", ["factory", "start", "health", "unhealthy", "setter"])
def test_what_a_service_says_when_it_fails_is_told_without_its_secrets(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Nested(msgspec.Struct):
        tokens: list[segue.Secret] = []

    class Leaky:
        def __init__(self, settings: Nested) -> None:
            self.leak = "".join(each.reveal() for each in settings.tokens)
            self.fail("factory")

        def fail(self, here: str) -> None:
            if self.leak and where == here:
                raise ConnectionError(f"https://me:{self.leak}@host refused")

        async def start(self) -> None:
            self.fail("start")

        def health(self) -> dict[str, Any]:
            self.fail("health")
            return {"ok": where != "unhealthy" or not self.leak, "reason": f"bad {self.leak}"}

    class Dependent:
        def __init__(self, leaky: Leaky) -> None: ...

        def set_leaky(self, leaky: Leaky) -> None:
            leaky.fail("setter")

    async def work() -> None:
        services = segue.Services()
        services.declare("leaky", Leaky, settings=Nested)
        services.declare("dependent", Dependent, requires=["leaky"])
        async with services:
            with pytest.raises(segue.SwapRefusedError, match=r"\*{8}") as caught:
                await services.reload("leaky", tokens=f'["{HIDDEN}"]')
            error: BaseException | None = caught.value
            while error is not None:
                assert HIDDEN not in str(error)
                error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)

    with caplog.at_level(logging.DEBUG):
        run(work())
    assert HIDDEN not in caplog.text


def test_a_failing_start_tells_its_cause_only_where_that_shows_no_secret() -> None:
    class Leaky:
        def __init__(self, settings: Plain) -> None:
            raise ConnectionError(f"no {settings.token.reveal()}")

    class Harmless:
        def __init__(self, settings: Plain) -> None:
            raise ConnectionError("no")

    async def work(kind: type, causes: bool) -> None:
        services = segue.Services()
        services.declare("x", kind, settings=Plain)
        with pytest.raises(VerbError) as caught:
            await services.__aenter__()
        assert (caught.value.__cause__ is not None) is causes
        assert HIDDEN not in str(caught.value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGUE_SERVICES__X__TOKEN", HIDDEN)
        run(work(Leaky, False))
        run(work(Harmless, True))
