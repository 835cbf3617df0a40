"""What the agents of all engines are set up with: settings, the bus, the drain."""

import contextlib
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from libs import telemetry
from libs.bus import jetstream
from libs.doors.serve import background, until_stopped
from libs.settings import Common
from services.scheduler.agent import Agent, Engine

RAY = "http://127.0.0.1:8265"


class Settings(Common, frozen=True, kw_only=True):
    node: Annotated[str, Meta(description="this node's name; unique")] = "agent"
    folder: Annotated[str, Meta(description="folder that outlives the agent")] = "agent"
    cpu_milli: Annotated[int, Meta(description="CPU offered to the scheduler; 0: all")] = 0
    memory_mib: Annotated[int, Meta(description="memory offered to the scheduler")] = 4096
    gpus: Annotated[int, Meta(ge=0, description="GPUs offered to the scheduler")] = 0
    gpu_model: Annotated[str, Meta(description="their model, as jobs ask for it")] = ""
    ray_address: Annotated[str, Meta(description="of the Ray cluster's dashboard")] = RAY
    ray_token: Annotated[str, Meta(description="the Ray cluster's, if it wants one")] = ""

    @property
    def placed_on(self) -> str:
        """The node whose work is its own."""
        return self.machine or self.node

    @property
    def folder_of_node(self) -> Path:
        return Path(self.folder).resolve() / self.node


async def serve(settings: Settings, engine: Engine) -> None:
    """Until SIGTERM or SIGINT; what runs then runs on."""
    with telemetry.start("agent", settings.otlp_endpoint, settings.log_level):
        folder = settings.folder_of_node
        folder.mkdir(parents=True, exist_ok=True)
        async with contextlib.AsyncExitStack() as stack:
            bus = await stack.enter_async_context(
                jetstream.connect(settings.nats_url, settings.nats_token, settings.node)
            )
            name = settings.node if settings.machine else ""
            agent = Agent(bus, engine, settings.placed_on, folder, name)
            await stack.enter_async_context(background(agent.run()))
            await until_stopped()
