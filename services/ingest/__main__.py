import os

import uvloop

from libs import telemetry
from libs.settings import load
from services.ingest.app import Settings, main

telemetry.log_everything("ingest")
uvloop.run(main(load(Settings, "ingest", os.environ)))
