"""The model repository of a stand-alone server: loads, reloads and unloads what lies in a folder.

A new version is loaded and warmed up first, then gets the requests, and only then does the old one
go. One model that cannot be loaded never stops another, nor the version of it that serves.
"""

import asyncio
import logging
import tempfile
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from libs.contracts.protos.model_config_pb2 import ModelConfig, ModelVersionPolicy
from libs.doors import Invalid, NotFound, Unavailable
from services.inference import layout, loading, modelconfig
from services.inference.endpoint import Endpoint, Origin
from services.inference.endpoints import Endpoints
from services.inference.layout import Found, Plan, Version
from services.inference.loading import Built
from services.inference.modelconfig import Misconfigured
from services.inference.models import Unloadable

log = logging.getLogger(__name__)
Mode = Literal["none", "explicit", "poll"]
"""Triton's names: all at the start; those asked for; and again whenever their files change."""
Row = tuple[str, str, str, str]
"""(name, version, state, reason)."""
LOADS_AT_ONCE_MAX = 4
FILE_PREFIX = "file:"
COMPONENT_CHARACTERS_MAX = 255


class Repository:
    """What is served follows what was loaded here."""

    def __init__(self, root: Path, mode: Mode, endpoints: Endpoints) -> None:
        self.root = root
        self.mode: Mode = mode
        self.endpoints = endpoints
        self.problems: dict[str, dict[str, str]] = {}
        """Model -> version, "" for all of it -> why it could not be loaded."""
        self.unloaded: set[str] = set()
        self.stamps: dict[str, object] = {}
        """Of the files that were loaded, or could not be."""
        self.locks: dict[str, asyncio.Lock] = {}
        self.loaders = ThreadPoolExecutor(LOADS_AT_ONCE_MAX, thread_name_prefix="load")

    async def start(self, wanted: Collection[str] = ()) -> None:
        """Loads everything; in mode `explicit` only what is wanted, `*` for everything."""
        found = {one.name: one for one in await asyncio.to_thread(layout.find, self.root)}
        chosen = list(found)
        if self.mode == "explicit" and "*" not in wanted:
            chosen = list(dict.fromkeys(wanted))
        await asyncio.gather(*(self.try_to_load(name, found.get(name)) for name in chosen))

    async def close(self) -> None:
        self.loaders.shutdown(wait=False, cancel_futures=True)

    async def try_to_load(self, name: str, found: Found | None) -> None:
        """A failure is told in the log and in the index."""
        try:
            if found is None:
                raise Misconfigured(f"{self.root} holds no model '{name}'")
            self.stamps[name] = await asyncio.to_thread(layout.stamp_of, found.place)
            await self.load_found(found)
        except Misconfigured as error:
            log.error("model '%s' is not served: %s", name, error)

    async def load(self, name: str, config: str = "", files: Mapping[str, bytes] = {}) -> None:
        """On a client's demand: `config` (JSON) and `files` stand for what the folder holds.

        Raises `Refused`.
        """
        self.check_explicit()
        try:
            override = modelconfig.parse_json(config) if config else None
            if files:
                await self.load_given(name, override, files)
            else:
                await self.load_found(await self.find(name), override)
        except Misconfigured as error:
            raise Invalid(f"failed to load '{name}', {error}") from error

    async def find(self, name: str) -> Found:
        """Raises `Misconfigured`."""
        for one in await asyncio.to_thread(layout.find, self.root):
            if one.name == name:
                return one
        raise Misconfigured(f"failed to poll from model repository: it holds no '{name}'")

    async def load_given(
        self, name: str, override: ModelConfig | None, files: Mapping[str, bytes]
    ) -> None:
        """The files of a request make a folder of their own, as long as they are read."""
        if override is None:
            raise Misconfigured("a `config` is needed where files are given")
        with tempfile.TemporaryDirectory(prefix="leptonic-model-") as folder:
            place = Path(folder) / "model"
            for path, content in files.items():
                write(place, path.removeprefix(FILE_PREFIX), content)
            await self.load_found(Found(name, place), override)

    async def load_found(self, found: Found, override: ModelConfig | None = None) -> None:
        """Raises `Misconfigured` when anything of it could not be loaded."""
        async with self.locks.setdefault(found.name, asyncio.Lock()):
            problems: dict[str, str] = {}
            built: list[Built] = []
            try:
                plan = await asyncio.to_thread(layout.read, found, override)
            except Misconfigured as error:
                problems[""] = str(error)
            else:
                for version in plan.versions:
                    try:
                        built.append(await self.built(plan, version))
                    except (Misconfigured, Unloadable) as error:
                        problems[str(version.number)] = str(error)
            await self.serve(found.name, built, complete=not problems)
            self.problems[found.name] = problems
            if problems:
                told = "; ".join(f"version {v}: {why}" if v else why for v, why in problems.items())
                raise Misconfigured(told)

    async def built(self, plan: Plan, version: Version) -> Built:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.loaders, loading.build, plan, version)

    async def serve(self, name: str, built: list[Built], complete: bool) -> None:
        """The newest gets the requests that name no version. What serves already goes on when its
        successor could not be loaded."""
        if not built:
            return
        endpoint = self.at(name)
        for one in built:
            await self.put(name, one)
        self.unloaded.discard(name)
        endpoint.direct({max(endpoint.served, key=int): 100})
        if complete:
            kept = {one.version for one in built}
            endpoint.direct({max(kept, key=int): 100})
            for version in [v for v in endpoint.served if v not in kept]:
                await endpoint.unload(version)

    async def put(self, name: str, one: Built) -> None:
        endpoint = self.at(name)
        endpoint.quarantined.pop(one.version, None)
        await self.endpoints.add(
            endpoint,
            one.version,
            one.model,
            one.limits,
            Origin(one.model.digest),
            config=one.config,
        )

    def at(self, name: str) -> Endpoint:
        return self.endpoints.at((self.endpoints.project, name))

    async def unload(self, name: str) -> None:
        """On a client's demand; nothing depends on a model, for ensembles are not served.

        Raises `Refused`.
        """
        self.check_explicit()
        key = (self.endpoints.project, name)
        if key not in self.endpoints.by_key and name not in self.problems:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        async with self.locks.setdefault(name, asyncio.Lock()):
            await self.drop(name)

    async def drop(self, name: str) -> None:
        self.problems.pop(name, None)
        self.unloaded.add(name)
        if (self.endpoints.project, name) in self.endpoints.by_key:
            await self.endpoints.remove((self.endpoints.project, name))

    def check_explicit(self) -> None:
        if self.mode != "explicit":
            raise Unavailable(
                f"explicit model load / unload is not allowed with --model-control-mode {self.mode}"
            )

    async def step_back(self, endpoint: Endpoint, version: str) -> None:
        """A quarantined version's requests go to the newest one before it that can be loaded."""
        found = {one.name: one for one in await asyncio.to_thread(found_or_none, self.root)}
        older = [v for v in endpoint.served if int(v) < int(version)]
        if not older and endpoint.name in found:
            older = await self.load_before(found[endpoint.name], int(version))
        if older:
            newest = max(older, key=int)
            log.warning("model '%s': version %s serves again", endpoint.name, newest)
            endpoint.direct({newest: 100})

    async def load_before(self, found: Found, number: int) -> list[str]:
        override = ModelConfig()
        if found.place.is_dir():
            override = await asyncio.to_thread(layout.written, found.place / layout.CONFIG_FILE)
        for older in sorted(layout.numbers_of(found), reverse=True):
            if older >= number:
                continue
            override.version_policy.specific.CopyFrom(ModelVersionPolicy.Specific(versions=[older]))
            try:
                plan = await asyncio.to_thread(layout.read, found, override)
                await self.put(found.name, await self.built(plan, plan.versions[0]))
            except (Misconfigured, Unloadable) as error:
                log.error("model '%s' version %d is not served: %s", found.name, older, error)
            else:
                return [str(older)]
        return []

    def index(self, ready_only: bool) -> list[Row]:
        """Every model of the folder: what serves, what could not be loaded, what was not asked."""
        rows = self.endpoints.index(ready_only)
        if ready_only:
            return rows
        rows += [
            (name, version, "UNAVAILABLE", why)
            for name, problems in self.problems.items()
            for version, why in problems.items()
        ]
        named = {row[0] for row in rows}
        left = [one.name for one in found_or_none(self.root) if one.name not in named]
        rows += [
            (name, "", "UNAVAILABLE" if name in self.unloaded else "", self.why_not(name))
            for name in left
        ]
        return sorted(rows)

    def why_not(self, name: str) -> str:
        return "unloaded" if name in self.unloaded else ""

    async def poll(self, every_s: float) -> None:
        """Follows the folder, for ever."""
        while True:
            await asyncio.sleep(every_s)
            await self.look()

    async def look(self) -> None:
        """Loads what is new or changed, unloads what is gone."""
        found = {one.name: one for one in await asyncio.to_thread(found_or_none, self.root)}
        for name in [name for name in self.stamps if name not in found]:
            self.stamps.pop(name)
            await self.drop(name)
            self.unloaded.discard(name)
        for name, one in found.items():
            if await asyncio.to_thread(layout.stamp_of, one.place) != self.stamps.get(name):
                await self.try_to_load(name, one)


def found_or_none(root: Path) -> list[Found]:
    """An empty folder may be filled later."""
    try:
        return layout.find(root)
    except Misconfigured:
        return []


def write(place: Path, path: str, content: bytes) -> None:
    """A file a client sent. Raises `Misconfigured` for a path that leads out of the folder."""
    parts = path.split("/")
    fits = all(
        part not in ("", ".", "..") and len(part) <= COMPONENT_CHARACTERS_MAX and "\0" not in part
        for part in parts
    )
    if not fits:
        raise Misconfigured(f"Invalid file path '{FILE_PREFIX}{path}': <version>/<file> is one")
    target = place.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
