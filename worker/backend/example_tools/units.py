"""From one unit of measurement to another."""

from __future__ import annotations

_UNITS: dict[str, dict[str, float]] = {
    "length": {
        "mm": 0.001,
        "cm": 0.01,
        "m": 1.0,
        "km": 1000.0,
        "in": 0.0254,
        "ft": 0.3048,
        "yd": 0.9144,
        "mi": 1609.344,
        "nmi": 1852.0,
    },
    "mass": {"mg": 1e-6, "g": 0.001, "kg": 1.0, "t": 1000.0, "oz": 0.028349523125, "lb": 0.45359237},
    "volume": {"ml": 0.001, "cl": 0.01, "l": 1.0, "m3": 1000.0, "gal": 3.785411784, "pt": 0.473176473},
    "time": {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0, "wk": 604_800.0},
    "speed": {"m/s": 1.0, "km/h": 1 / 3.6, "mph": 0.44704, "kn": 1852 / 3600},
    "data": {
        "B": 1.0,
        "kB": 1e3,
        "MB": 1e6,
        "GB": 1e9,
        "TB": 1e12,
        "KiB": 2.0**10,
        "MiB": 2.0**20,
        "GiB": 2.0**30,
    },
}
"""By quantity: how much of its base unit each is."""


def convert_units(value: float, from_unit: str, to_unit: str) -> str:
    """Convert a value between units of length, mass, volume, time, speed, data or temperature.

    Args:
        value: How many of the first unit.
        from_unit: For example km, mi, kg, lb, l, gal, h, km/h, MiB, C, F or K.
        to_unit: A unit of the same quantity.
    """
    if {from_unit, to_unit} <= {"C", "F", "K"}:
        return f"{_from_kelvin(_to_kelvin(value, from_unit), to_unit):.10g} {to_unit}"
    for units in _UNITS.values():
        if from_unit in units and to_unit in units:
            return f"{value * units[from_unit] / units[to_unit]:.10g} {to_unit}"
    known = "; ".join(f"{name}: {', '.join(units)}" for name, units in _UNITS.items())
    raise ValueError(f"{from_unit} can't be made {to_unit}; there are {known}; temperature: C, F, K")


def _to_kelvin(value: float, unit: str) -> float:
    return {"C": value + 273.15, "F": (value + 459.67) * 5 / 9, "K": value}[unit]


def _from_kelvin(kelvin: float, unit: str) -> float:
    return {"C": kelvin - 273.15, "F": kelvin * 9 / 5 - 459.67, "K": kelvin}[unit]
