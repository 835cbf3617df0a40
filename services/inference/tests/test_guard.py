"""Every HTTP door of the service asks for a token where there are any."""

from msgspec.structs import replace

from libs.bus.jetstream import JetStreamBus
from services.inference.app import Settings
from services.inference.tests.conftest import started

TOKEN = "let-me-in"
BRINGING = {"Authorization": f"Bearer {TOKEN}"}
UNKNOWN = "/v1/projects/default/predictions/none"


async def test_the_platforms_api_is_no_way_around(settings: Settings, bus: JetStreamBus) -> None:
    async with started(replace(settings, tokens=TOKEN), bus) as replica:
        for door, path in ((replica.api, UNKNOWN), (replica.http, "/v2/models/none")):
            assert (await door.get(path)).status_code == 401
            wrong = {"Authorization": "Bearer wrong"}
            assert (await door.get(path, headers=wrong)).status_code == 401
            assert (await door.get(path, headers=BRINGING)).status_code == 404
            assert (await door.get("/health/live")).status_code == 200
