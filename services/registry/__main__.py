import os

import uvloop

from libs.settings import load
from services.registry.app import Settings, main

uvloop.run(main(load(Settings, "registry", os.environ)))
