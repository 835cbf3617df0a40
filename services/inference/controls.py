"""Trace and log settings that clients read and change, under Triton's names and with effect.

Traces: how many requests this server traces by itself; those whose callers trace are always
traced. Logs: which lines this process writes.
"""

import logging
from collections.abc import Mapping, Sequence

from libs.doors import Invalid
from services.inference.endpoints import Endpoints
from services.inference.served import Rates

OFF, TIMESTAMPS = "OFF", "TIMESTAMPS"
RATE_MAX = (1 << 32) - 1
DIGITS_MAX = 10
TRACES_PER_S = 100.0
"""Of a version, once traces are asked for where the process's settings ask for none."""
FIXED = {"log_frequency": "0", "trace_file": "", "trace_mode": "opentelemetry"}
"""Spans go where the process's settings say."""
ENDLESS = "-1"
SILENT = logging.CRITICAL + 1
LEVELS = {
    "log_info": logging.INFO,
    "log_warning": logging.WARNING,
    "log_error": logging.ERROR,
}
LOG_FIXED = {"log_file": "", "log_format": "default"}
Settings = dict[str, list[str]]


class Controls:
    def __init__(self, endpoints: Endpoints) -> None:
        self.endpoints = endpoints
        self.rates = endpoints.notes.rates
        self.changed: dict[str, Settings] = {"": {}}
        """Model -> what was set for it; "" for every model."""
        endpoints.rates_of = self.rates_of
        endpoints.notes.on_trace = self.traced
        self.log_settings = log_settings_at(logging.getLogger().level)

    def trace(self, model: str, changes: Mapping[str, Sequence[str]]) -> Settings:
        """The settings of a model, or of all for "", after the changes: no value takes one back.

        Raises `Refused`.
        """
        name = self.endpoints.find(model).name if model else ""
        for setting, values in changes.items():
            check(setting, values)
        if changes:
            kept = self.changed.get(name, {}) | {n: list(v) for n, v in changes.items() if v}
            self.changed[name] = {n: v for n, v in kept.items() if changes.get(n) != []}
            self.apply()
        return self.settings(name)

    def apply(self) -> None:
        for served in self.endpoints.versions("", ""):
            served.sample(self.rates_of(served.name))

    def traced(self, name: str) -> None:
        """One of the traces that are left; those already begun may be a few more."""
        owner = name if "trace_count" in self.changed.get(name, {}) else ""
        (left,) = self.changed[owner].get("trace_count", [ENDLESS])
        if int(left) > 0:
            self.changed[owner]["trace_count"] = [str(int(left) - 1)]
            if left == "1":
                self.apply()

    def settings(self, name: str) -> Settings:
        level = TIMESTAMPS if self.rates.traces_per_s else OFF
        known: Settings = {"trace_level": [level], "trace_rate": ["1"], "trace_count": [ENDLESS]}
        fixed = {setting: [value] for setting, value in FIXED.items()}
        return fixed | known | self.changed[""] | self.changed.get(name, {})

    def rates_of(self, name: str) -> Rates:
        """Of the requests that would be traced anyhow, one of `trace_rate`."""
        said = self.settings(name)
        rate = int(said["trace_rate"][0])
        off = said["trace_level"] == [OFF] or said["trace_count"] == ["0"]
        most_per_s = self.rates.traces_per_s or TRACES_PER_S
        return self.rates._replace(traces_per_s=0 if off else most_per_s / rate)

    def log(self, changes: Mapping[str, bool | int | str]) -> dict[str, bool | int | str]:
        """The settings after the changes. Raises `Invalid`."""
        for name, value in changes.items():
            check_log(name, value)
        if changes:
            self.log_settings |= changes
            logging.getLogger().setLevel(level_of(self.log_settings))
        return dict(self.log_settings)


def check(setting: str, values: Sequence[str]) -> None:
    if setting in FIXED:
        if list(values) not in ([], [FIXED[setting]]):
            raise Invalid(f"{setting} is {FIXED[setting]!r} here and cannot be changed", setting)
    elif setting == "trace_level":
        if list(values) not in ([], [OFF], [TIMESTAMPS]):
            raise Invalid(f"{OFF} or {TIMESTAMPS}, got {', '.join(values)}", setting)
    elif setting == "trace_rate":
        if values and (len(values) > 1 or not is_whole(values[0], 1)):
            raise Invalid(f"one whole number from 1 to {RATE_MAX}, got {list(values)}", setting)
    elif setting == "trace_count":
        if values and list(values) != [ENDLESS] and (len(values) > 1 or not is_whole(values[0], 0)):
            raise Invalid(f"one whole number, or -1 for no end, got {list(values)}", setting)
    else:
        raise Invalid(f"unknown trace setting: '{setting}'")


def is_whole(text: str, least: int) -> bool:
    short = text.isascii() and text.isdigit() and len(text) <= DIGITS_MAX
    return short and least <= int(text) <= RATE_MAX


def check_log(name: str, value: bool | int | str) -> None:
    if name in LOG_FIXED:
        if value != LOG_FIXED[name]:
            raise Invalid(f"{name} cannot be updated through the protocol", name)
    elif name in LEVELS:
        if not isinstance(value, bool):
            raise Invalid(f"expects a boolean, got {value!r}", name)
    elif name == "log_verbose_level":
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise Invalid(f"expects an unsigned integer, got {value!r}", name)
    else:
        raise Invalid(f"unknown log setting: '{name}'")


def log_settings_at(level: int) -> dict[str, bool | int | str]:
    """How a level is said in these words."""
    found: dict[str, bool | int | str] = {n: level <= own for n, own in LEVELS.items()}
    return found | LOG_FIXED | {"log_verbose_level": int(level <= logging.DEBUG)}


def level_of(settings: Mapping[str, bool | int | str]) -> int:
    """The lowest that is on. One process has one level: a lower one brings those above it."""
    if settings["log_verbose_level"]:
        return logging.DEBUG
    return min((level for name, level in LEVELS.items() if settings[name]), default=SILENT)
