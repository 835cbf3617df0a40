import os

import uvloop

from libs import settings
from services.preprocess.app import NAME, Settings, main

uvloop.run(main(settings.load(Settings, NAME, os.environ)))
