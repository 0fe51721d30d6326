"""Another name of efft_kernels.serving.app, and of its command."""

import sys

from .serving import app

if __name__ == "__main__":
    app.command()
else:
    sys.modules[__name__] = app
