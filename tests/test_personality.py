"""Personality and emotion: who answers, and how that feels."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import segue
from segue.worker.backend.conversation import Sampling
from segue.worker.backend.emotion import Emotion, EmotionSettings, EmotionSystem
from segue.worker.backend.lexicon import feel
from segue.worker.backend.personality import PersonalityManager, PersonalitySettings, ProfileError

PIRATE = """
prompt = "You are a pirate."
[traits]
boldness = 0.9
[sampling]
temperature = 1.1
stop = ["Arr!"]
[emotion]
valence = 0.5
arousal = -0.25
half_life_s = 60
"""


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def managed(profile: str = "plain", directory: Path | str = "") -> PersonalityManager:
    return PersonalityManager(PersonalitySettings(profile, str(directory)))


@pytest.fixture
def pirates(tmp_path: Path) -> Path:
    directory = tmp_path / "profiles"
    directory.mkdir()
    (directory / "pirate.toml").write_text(PIRATE)
    return directory


def test_three_profiles_come_with_it() -> None:
    for name in ("plain", "warm", "terse"):
        manager = managed(name)
        assert manager.profile.name == name
        assert manager.profile.prompt
        assert manager.profile.half_life_s > 0
    assert manager.known == ["plain", "terse", "warm"]


def test_a_profile_of_ones_own_is_read_whole(pirates: Path) -> None:
    manager = managed("pirate", pirates)
    profile = manager.profile
    assert manager.known == ["pirate", "plain", "terse", "warm"]
    assert (profile.prompt, profile.traits) == ("You are a pirate.", {"boldness": 0.9})
    assert profile.sampling == Sampling(temperature=1.1, stop=("Arr!",))
    assert (profile.valence, profile.arousal, profile.half_life_s) == (0.5, -0.25, 60)


def test_ones_own_profile_replaces_the_bundled_one_of_its_name(pirates: Path) -> None:
    (pirates / "plain.toml").write_text('prompt = "Mine."')
    assert managed("plain", pirates).profile.prompt == "Mine."


@pytest.mark.parametrize(
    "name", ["none", "../pirate", "/etc/passwd", "pirate.toml", ".", "", "a/b", "hidden"]
)
def test_an_unknown_profile_names_the_known_ones_and_no_name_leaves_the_directory(
    pirates: Path, name: str
) -> None:
    (pirates.parent / "outside.toml").write_text('prompt = "Out."')
    (pirates / "hidden.toml").symlink_to(pirates.parent / "outside.toml")
    with pytest.raises(segue.Unknown, match="known: pirate, plain, terse, warm"):
        managed(name, pirates)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt = 1", "prompt: Expected `str`, got `int`"),
        ("", "missing required field `prompt`"),
        ('prompt = "x"\ncolour = 1', "unknown field `colour`"),
        ('prompt = "x"\n[sampling]\ntemperatur = 1', r"sampling: Object contains unknown field `temperatur`"),
        ('prompt = "x"\n[sampling]\ntemperature = "hot"', "sampling.temperature: Expected"),
        ('prompt = "x"\n[emotion]\nvalence = 2', "emotion.valence: Expected `float` <= 1"),
        ('prompt = "x"\n[traits]\nwarmth = 7', "traits.*Expected `float` <= 1"),
        ('prompt = "x"\n[emotion]\nhalf_life_s = 0', "half_life_s: Expected `float` > 0"),
        ("prompt = ", "Invalid value"),
    ],
)
def test_a_profile_with_a_mistake_is_refused_with_file_and_key(pirates: Path, text: str, reason: str) -> None:
    (pirates / "bad.toml").write_text(text)
    with pytest.raises(ProfileError, match=reason) as told:
        managed("bad", pirates)
    assert "bad.toml" in str(told.value)
    assert managed("pirate", pirates).profile.name == "pirate", "it harms nobody else"


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"profiles_dir .*none can't be read"):
        managed("plain", tmp_path / "none")


def test_a_swap_of_the_personality_rewires_the_emotion_and_an_unknown_one_changes_nothing(
    pirates: Path,
) -> None:
    async def scenario() -> None:
        services = segue.Services()
        personality = services.declare("personality", PersonalityManager, settings=PersonalitySettings)
        emotion = services.declare(
            "emotion", EmotionSystem, requires=[personality], settings=EmotionSettings, title="EmotionSystem"
        )
        async with services:
            report = await services.reload("personality", profile="pirate", profiles_dir=str(pirates))
            assert report["rewired"] == ["EmotionSystem"]
            assert emotion.current.personality.profile.name == "pirate"
            with pytest.raises(segue.Unknown) as told:
                await services.reload("personality", profile="nobody")
            assert told.value.known == ["pirate", "plain", "terse", "warm"]
            (pirates / "bad.toml").write_text("prompt = 1")
            with pytest.raises(segue.SwapRefusedError, match=r"bad\.toml: prompt: Expected"):
                await services.reload("personality", profile="bad")
            assert personality.current.profile.name == "pirate"

    asyncio.run(scenario())


# ----------------------------------------------------------------------------------------------------------- emotion


def feeling(directory: Path, **settings: Any) -> tuple[EmotionSystem, Clock]:
    clock = Clock()
    return EmotionSystem(EmotionSettings(**settings), managed("pirate", directory), None, clock), clock


def test_a_feeling_fades_to_the_baseline_by_half_in_each_half_life(pirates: Path) -> None:
    emotion, clock = feeling(pirates, sensitivity=1)
    assert emotion.state("s") == Emotion(0.5, -0.25)
    emotion.felt("s", -0.5, 0.75)
    assert emotion.state("s") == Emotion(-0.5, 0.75)
    assert emotion.state("other") == Emotion(0.5, -0.25)
    clock.now += 60
    assert emotion.state("s") == Emotion(0.0, 0.25)
    clock.now += 60
    assert emotion.state("s") == Emotion(0.25, 0.0)
    clock.now += 1e6
    assert emotion.state("s") == pytest.approx(Emotion(0.5, -0.25)) or emotion.state(
        "s"
    ).valence == pytest.approx(0.5)


def test_feelings_stay_within_their_range(pirates: Path) -> None:
    emotion, clock = feeling(pirates)
    for _ in range(100):
        emotion.felt("s", 7, -7)
    felt = emotion.state("s")
    assert 0.99 < felt.valence <= 1
    assert -1 <= felt.arousal < -0.99
    clock.now -= 1e6  # a clock that was set back
    assert -1 <= emotion.state("s").valence <= 1


def test_the_conversations_that_are_remembered_are_bounded(pirates: Path) -> None:
    emotion, _ = feeling(pirates, max_sessions=3)
    for number in range(10):
        emotion.felt(f"s{number}", -1, 1)
    assert emotion.metrics() == {"sessions": 3}
    assert emotion.state("s0") == Emotion(0.5, -0.25)
    assert emotion.state("s9") != Emotion(0.5, -0.25)


def test_feelings_go_on_over_a_swap_and_in_another_process(pirates: Path) -> None:
    emotion, clock = feeling(pirates)
    emotion.felt("s", -1, 1)
    after = EmotionSystem(EmotionSettings(), managed("pirate", pirates), emotion, clock)
    assert after.state("s") == emotion.state("s")
    elsewhere = EmotionSystem(EmotionSettings(), managed("pirate", pirates), None, clock)
    elsewhere.recall("s", emotion.state("s"), clock.now)
    assert elsewhere.state("s") == emotion.state("s")
    elsewhere.recall("s", Emotion(1, 1), clock.now - 10)
    assert elsewhere.state("s") == emotion.state("s"), "what is older than what is known says nothing"


@pytest.mark.parametrize(
    ("text", "valence", "arousal"),
    [
        ("I love this, thank you", 1, 1),
        ("this is terrible", -1, 0),
        ("this is not good", -1, 0),
        ("not bad at all", 1, 0),
        ("the train leaves at nine", 0, 0),
        ("relax, it is a peaceful evening", 0, -1),
        ("hurry! emergency! quick!", 0, 1),
        ("", 0, 0),
    ],
)
def test_words_move_the_same_way_each_time(text: str, valence: int, arousal: int) -> None:
    found = feel(text)
    assert found == feel(text)
    assert [(value > 0) - (value < 0) for value in found] == [valence, arousal]
