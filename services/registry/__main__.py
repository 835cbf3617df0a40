import os

import uvloop

from libs import telemetry
from libs.settings import load
from services.registry.app import Settings, main

telemetry.log_everything("registry")
uvloop.run(main(load(Settings, "registry", os.environ)))
