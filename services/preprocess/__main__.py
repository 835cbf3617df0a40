import os

import uvloop

from libs import settings, telemetry
from services.preprocess.app import NAME, Settings, main

telemetry.log_everything(NAME)
uvloop.run(main(settings.load(Settings, NAME, os.environ)))
