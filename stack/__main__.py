import sys

from stack.app import main

sys.exit(main())
