"""The model repository of a stand-alone server: loads, reloads and unloads what lies in a folder.

A new version is loaded and warmed up first, then gets the requests, and only then does the old one
go. One model that cannot be loaded never stops another, nor the version of it that serves.
"""

import asyncio
import logging
import shutil
import tempfile
import weakref
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal
from weakref import WeakValueDictionary

from libs.contracts.protos.model_config_pb2 import ModelConfig, ModelVersionPolicy
from libs.doors import Invalid, NotFound, Unavailable
from services.inference import layout, loading, modelconfig
from services.inference.endpoint import Endpoint, Origin
from services.inference.endpoints import Endpoints, Key
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
        self.locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Of the models that change just now."""
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
        except (Misconfigured, OSError) as error:
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
        for one in await asyncio.to_thread(found_or_none, self.root):
            if one.name == name:
                return one
        raise Misconfigured(f"failed to poll from model repository: it holds no '{name}'")

    async def load_given(
        self, name: str, override: ModelConfig | None, files: Mapping[str, bytes]
    ) -> None:
        """The files of a request make a folder of their own, for as long as the model lives: a
        worker that takes over from one that crashed reads them again."""
        if override is None:
            raise Misconfigured("a `config` is needed where files are given")
        folder = await asyncio.to_thread(Folder, files)
        try:
            await self.load_found(Found(name, folder.place), override, folder)
        except Misconfigured:
            if not await self.is_known(name):
                self.problems.pop(name, None)
            raise

    async def is_known(self, name: str) -> bool:
        """Any other name is a client's: of these nothing is remembered."""
        found = await asyncio.to_thread(found_or_none, self.root)
        return self.key(name) in self.endpoints.by_key or name in [one.name for one in found]

    def key(self, name: str) -> Key:
        return (self.endpoints.project, name)

    def lock(self, name: str) -> asyncio.Lock:
        return self.locks.setdefault(name, asyncio.Lock())

    async def load_found(
        self, found: Found, override: ModelConfig | None = None, keeps: object = None
    ) -> None:
        """Raises `Misconfigured` when anything of it could not be loaded."""
        async with self.lock(found.name):
            problems: dict[str, str] = {}
            built: list[Built] = []
            try:
                plan = await asyncio.to_thread(layout.read, found, override)
                plan = plan._replace(keeps=keeps)
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
        if self.key(name) not in self.endpoints.by_key and name not in self.problems:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        async with self.lock(name):
            await self.drop(name)
        if not await self.is_known(name):
            self.unloaded.discard(name)

    async def drop(self, name: str) -> None:
        self.problems.pop(name, None)
        self.unloaded.add(name)
        if self.key(name) in self.endpoints.by_key:
            await self.endpoints.remove(self.key(name))

    def check_explicit(self) -> None:
        if self.mode != "explicit":
            raise Unavailable(
                f"explicit model load / unload is not allowed with --model-control-mode {self.mode}"
            )

    async def step_back(self, endpoint: Endpoint, version: str) -> None:
        """A quarantined version's requests go to the newest one before it that can be loaded."""
        async with self.lock(endpoint.name):
            if self.endpoints.by_key.get(self.key(endpoint.name)) is endpoint:
                await self.give_way(endpoint, version)

    async def give_way(self, endpoint: Endpoint, version: str) -> None:
        found = {one.name: one for one in await asyncio.to_thread(found_or_none, self.root)}
        older = [v for v in endpoint.served if int(v) < int(version)]
        if not older and endpoint.name in found:
            older = await self.load_before(found[endpoint.name], int(version))
        if older:
            newest = max(older, key=int)
            log.warning("model '%s': version %s serves again", endpoint.name, newest)
            endpoint.direct({newest: 100})

    async def load_before(self, found: Found, number: int) -> list[str]:
        for older in sorted(await asyncio.to_thread(layout.numbers_of, found), reverse=True):
            if older >= number:
                continue
            try:
                plan = await asyncio.to_thread(plan_of, found, older)
                await self.put(found.name, await self.built(plan, plan.versions[0]))
            except (Misconfigured, OSError, Unloadable) as error:
                log.error("model '%s' version %d is not served: %s", found.name, older, error)
            else:
                return [str(older)]
        return []

    async def index(self, ready_only: bool) -> list[Row]:
        """Every model of the folder: what serves, what could not be loaded, what was not asked."""
        if ready_only:
            return self.endpoints.index(ready_only)
        found = await asyncio.to_thread(found_or_none, self.root)
        rows = self.endpoints.index(ready_only)
        rows += [
            (name, version, "UNAVAILABLE", why)
            for name, problems in self.problems.items()
            for version, why in problems.items()
        ]
        named = {row[0] for row in rows}
        left = [one.name for one in found if one.name not in named]
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
        seen = await asyncio.to_thread(seen_in, self.root)
        if seen is None:
            return
        found = {one.name: one for one in seen}
        for name in [name for name in self.stamps if name not in found]:
            self.stamps.pop(name)
            async with self.lock(name):
                await self.drop(name)
            self.unloaded.discard(name)
        for name, one in found.items():
            if await self.is_changed(one):
                await self.try_to_load(name, one)

    async def is_changed(self, found: Found) -> bool:
        try:
            stamp = await asyncio.to_thread(layout.stamp_of, found.place)
        except OSError as error:  # as it is replaced; or for good, then it is told each time
            log.warning("model '%s' cannot be looked at: %s", found.name, error)
            return False
        return stamp != self.stamps.get(found.name)


def found_or_none(root: Path) -> list[Found]:
    return seen_in(root) or []


def seen_in(root: Path) -> list[Found] | None:
    """None while there is nothing at all, or it cannot be read: what is replaced, or mounted anew,
    is not there for a moment. An empty folder may be filled later."""
    try:
        return layout.find(root)
    except (layout.Absent, OSError) as error:
        log.warning("the model repository is not there: %s", error)
        return None
    except Misconfigured:
        return []


def plan_of(found: Found, number: int) -> Plan:
    """Of this version alone. Raises `Misconfigured`, `OSError`."""
    config = ModelConfig()
    if found.place.is_dir():
        config = layout.written(found.place / layout.CONFIG_FILE)
    config.version_policy.specific.CopyFrom(ModelVersionPolicy.Specific(versions=[number]))
    return layout.read(found, config)


class Folder:
    """Of files that a client sent. It goes when nobody holds it any more."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """Raises `Misconfigured`."""
        root = tempfile.mkdtemp(prefix="leptonic-model-")
        self.gone = weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
        self.place = Path(root) / "model"
        for path, content in files.items():
            write(self.place, path.removeprefix(FILE_PREFIX), content)


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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    except OSError as error:
        raise Misconfigured(f"'{FILE_PREFIX}{path}' cannot be kept: {error.strerror}") from error
