import os

import uvloop

from libs.settings import load
from services.ingest.app import Settings, main

uvloop.run(main(load(Settings, "ingest", os.environ)))
