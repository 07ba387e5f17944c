"""Put this folder, which holds the installed rooms (kernels, models, ...), just ahead of the site-packages it lies in.

Imported by `functional_trainer.pth` when Python starts. PyPI has an unrelated package called `kernels`: this way the
files of the two never mix, ours is the one imported, and uninstalling either leaves the other whole.
"""

import sys
from pathlib import Path

rooms = Path(__file__).parent
site_packages = str(rooms.parent)
sys.path.insert(sys.path.index(site_packages) if site_packages in sys.path else 0, str(rooms))
