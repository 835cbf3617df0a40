import os

import uvloop

from libs import telemetry
from libs.settings import load
from services.scheduler.app import Settings, main

telemetry.log_everything("scheduler")
uvloop.run(main(load(Settings, "scheduler", os.environ)))
